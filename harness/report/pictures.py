"""F9: what the numbers look like: one prompt and latent down each column, the base model first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from harness.report.analysis import Analysis
from harness.report.captions import Drawn
from harness.report.formatting import fixed, joined
from harness.report.glyphs import readable
from harness.report.records import BASE, HELD_OUT
from harness.report.style import DPI, GREY, PALE, looks

PROMPTS, METHODS = 8, 10
TILE, GAP = 192, 8
LEFT, TOP, UNDER = 150, 62, 22
LABEL_WIDTH = 23
COLUMNS = ("arm", "seed", "prompt_id", "prompt", "noise_id", "training_reward", "score", "picture")


@dataclass(frozen=True)
class Line:
    """One row of the grid: which cell's pictures."""

    arm: str
    cell: str
    seed: int


def picture_grid(analysis: Analysis, training_reward: str, name: str) -> Drawn | None:
    """Base and every arm on the first held-out prompts of the suite; None where no picture was kept."""
    run = analysis.run
    prompts = run.prompts("held-out")[:PROMPTS]
    lines = [Line(BASE, run.base.name, -1)]
    shown = methods_shown(analysis, training_reward)
    for arm in shown:
        seed = median_seed(analysis, arm, training_reward)
        cells = {cell.seed: cell.name for cell in run.cells_of(arm, training_reward)}
        if seed is not None:
            lines.append(Line(arm, cells[seed], seed))
    scores = _scores(analysis, lines, training_reward)
    rows = [_row(analysis, line, prompt, training_reward, scores) for line in lines for prompt in prompts]
    data = pd.DataFrame(rows, columns=list(COLUMNS))
    if not any((run.folder / str(path)).is_file() for path in data["picture"] if path):
        return None
    figure = _draw(analysis, lines, list(prompts), data)
    seeds = joined([f"{line.arm}: seed {line.seed}" for line in lines[1:]])
    caption = (
        f"Pictures for the same prompt and initial latent down each column; under each picture its score by "
        f"{training_reward}. Chosen by rule, not by eye: the first {len(prompts)} held-out prompts of the suite, the "
        f"first latent of the noise bank, and of each method the seed with the median final {training_reward} "
        f"({seeds})."
    )
    if len(shown) < len(run.arms):
        caption += (
            f" Of {len(run.arms)} methods {run.reference} and the {len(shown) - 1} with the largest mean gain; "
            "pictures of all are in the run's directory."
        )
    title = f"Pictures {'after training on' if run.relation == 'trained on' else run.relation} {training_reward}"
    alt = (
        f"{title}: base model and {joined([line.arm for line in lines[1:]])}, for {len(prompts)} held-out prompts. "
        f"Mean score of the row: {_means(data)}."
    )
    return Drawn(name, title, figure, data, caption, alt, vector=False)


def methods_shown(analysis: Analysis, training_reward: str) -> tuple[str, ...]:
    """All methods in their order; of more than `METHODS` the reference and those with the largest mean gain."""
    arms = analysis.run.arms
    if len(arms) <= METHODS:
        return arms
    gains = {arm: analysis.final(arm, training_reward).interval.estimate for arm in arms}
    best = sorted(arms, key=lambda arm: (arm != analysis.run.reference, not np.isfinite(gains[arm]), -gains[arm]))
    return tuple(arm for arm in arms if arm in best[:METHODS])


def median_seed(analysis: Analysis, arm: str, training_reward: str) -> int | None:
    """The seed with the (lower) median final gain on the training reward; None where no seed has one."""
    gain = analysis.final(arm, training_reward)
    found = sorted((value, seed) for value, seed in zip(gain.values, gain.seeds, strict=True) if np.isfinite(value))
    return found[(len(found) - 1) // 2][1] if found else None


def _scores(analysis: Analysis, lines: list[Line], reward: str) -> dict[tuple[str, str, int], float]:
    """Final scores of the cells shown, by cell, prompt and latent."""
    base = analysis.gains.base_scores(reward, HELD_OUT)
    places = [(p, n) for p in base.prompts for n in base.pictures]
    values = base.values.ravel().tolist() if len(base.seeds) else []
    known = {(BASE, str(p), int(str(n))): value for (p, n), value in zip(places, values, strict=False)}
    for line in lines[1:]:
        rows = analysis.gains.rows(line.arm, reward, reward)
        mine = rows[rows["cell"] == line.cell]
        keys = zip(mine["prompt_id"], mine["noise_id"], mine["score"], strict=True)
        known |= {(line.arm, str(p), int(n)): float(score) for p, n, score in keys}
    return known


def _row(
    analysis: Analysis, line: Line, prompt: str, reward: str, scores: dict[tuple[str, str, int], float]
) -> dict[str, object]:
    noise = analysis.gains.first_latents.get(prompt, 0)
    path = f"cells/{line.cell}/images/final/{prompt}--{noise}.png"
    exists = (analysis.run.folder / path).is_file()
    return {
        "arm": line.arm,
        "seed": line.seed,
        "prompt_id": prompt,
        "prompt": analysis.run.prompt_text(prompt),
        "noise_id": noise,
        "training_reward": reward,
        "score": scores.get((line.arm, prompt, noise), np.nan),
        "picture": path if exists else "",
    }


def _draw(analysis: Analysis, lines: list[Line], prompts: list[str], data: pd.DataFrame) -> Figure:
    width = LEFT + len(prompts) * (TILE + GAP)
    height = TOP + len(lines) * (TILE + UNDER + GAP)
    figure = Figure(figsize=(width / DPI, height / DPI))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    look = looks(analysis.run.arms)
    canvas = Image.new("RGB", (width, height), "white")
    cells = data.to_dict("records")
    for i, line in enumerate(lines):
        y = TOP + i * (TILE + UNDER + GAP)
        colour = look[line.arm].colour if line.arm in look else "black"
        label = "base model" if line.arm == BASE else f"{_short(readable(line.arm))}\nseed {line.seed}"
        axes.text(LEFT - 12, y + TILE / 2, label, ha="right", va="center", fontsize=9, color=colour, fontweight="bold")
        for j in range(len(prompts)):
            cell = cells[i * len(prompts) + j]
            x = LEFT + j * (TILE + GAP)
            if cell["picture"]:
                canvas.paste(_tile(analysis, str(cell["picture"])), (x, y))
            else:
                canvas.paste(PALE, (x, y, x + TILE, y + TILE))
                axes.text(x + TILE / 2, y + TILE / 2, "no picture", ha="center", va="center", fontsize=7, color=GREY)
            if np.isfinite(cell["score"]):
                text = fixed(float(cell["score"]), 2, sign=True)
                axes.text(x + TILE / 2, y + TILE + 3, text, ha="center", va="top", fontsize=7.5, color=GREY)
    for j in range(len(prompts)):
        text = _wrapped(readable(str(cells[j]["prompt"])))
        axes.text(LEFT + j * (TILE + GAP) + TILE / 2, TOP - 8, text, ha="center", va="bottom", fontsize=8)
    axes.imshow(np.asarray(canvas), extent=(0, width, height, 0), interpolation="none", zorder=0)
    return figure


def _tile(analysis: Analysis, path: str) -> Image.Image:
    with Image.open(analysis.run.folder / path) as picture:
        return picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)


def _short(text: str, length: int = 14) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _wrapped(text: str) -> str:
    """At most two lines of a prompt, the rest as an ellipsis."""
    words, lines = text.split(), [""]
    for word in words:
        candidate = f"{lines[-1]} {word}".strip()
        if len(candidate) > LABEL_WIDTH and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = candidate
    lines = [_short(line, LABEL_WIDTH) for line in lines]
    return "\n".join(lines if len(lines) <= 2 else [lines[0], _short(lines[1] + " …", LABEL_WIDTH)])


def _means(data: pd.DataFrame) -> str:
    means = data.groupby("arm", sort=False)["score"].mean()
    return joined([f"{arm} {fixed(float(value), 2, sign=True)}" for arm, value in means.items()])
