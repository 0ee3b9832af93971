"""The pictures that a run stored, with their scores: what the explorer can show for a cell, a point and a prompt."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness.report.analysis import Analysis
from harness.report.formatting import joined, plural
from harness.report.gains import SPENT
from harness.report.page.inline import PROMPTS, SIDE, Group, Inlined, Stored, inline
from harness.report.pictures import median_seed
from harness.report.records import BASE, DEFAULT_VARIANT, FINAL, HELD_OUT

Spent = dict[tuple[str, str], tuple[float, ...]]

CHOSEN, ALONG = "at the end of training", "along training"
OTHERS, OTHERS_ALONG = "of the other seeds, at the end", "of the other seeds, along training"


@dataclass(frozen=True)
class Point:
    """A place in training where a cell's pictures are stored, and what had been spent until there."""

    name: str
    spent: tuple[float, ...]
    prompts: frozenset[int]


@dataclass(frozen=True, eq=False)
class Album:
    """Pictures of the first latent of each held-out prompt.

    Attributes:
        prompts: (id, text, noise id) in the order of the suite.
        points: Stored points of each cell in the order of training, the base model's under its own cell.
        scores: (cell, point) -> score by the cell's training reward, of the first `PROMPTS` prompts that have one.
        base_scores: The base model's, by reward.
        inlined: Those inside the page.
    """

    base: str
    prompts: tuple[tuple[str, str, int], ...]
    points: dict[str, tuple[Point, ...]]
    scores: dict[tuple[str, str], dict[int, float]]
    base_scores: dict[str, dict[int, float]]
    inlined: Inlined

    def records(self, trained: list[str]) -> dict[str, Any]:
        """The album as lists for JSON; sets of prompts as hexadecimal digits, four prompts each, equal ones once."""
        masks: dict[str, int] = {}
        first = range(min(PROMPTS, len(self.prompts)))

        def listed(scores: dict[int, float]) -> list[float | None]:
            return [float(f"{scores[i]:.4g}") if i in scores else None for i in first]

        cells = {
            cell: [
                {
                    "point": point.name,
                    "spent": [float(f"{value:.6g}") if value == value else None for value in point.spent],
                    "stored": masks.setdefault(_mask(point.prompts, len(self.prompts)), len(masks)),
                    "scores": listed(self.scores.get((cell, point.name), {})),
                    "pictures": [self.inlined.pictures.get(Stored(cell, point.name, i), 0) for i in first],
                }
                for point in points
            ]
            for cell, points in self.points.items()
        }
        return {
            "base": self.base,
            "prompts": [list(prompt) for prompt in self.prompts],
            "stored": cells,
            "base_scores": [listed(self.base_scores.get(reward, {})) for reward in trained],
            "masks": list(masks),
        }

    @property
    def statement(self) -> str:
        """Which pictures are inside the page, and by what rule."""
        if not any(point.prompts for points in self.points.values() for point in points):
            return "No pictures were kept in this run."
        kinds = [f"{plural(number, 'prompt')} {kind}" for kind, number in self.inlined.prompts.items() if number]
        inside = joined(kinds) or "none"
        return (
            f"Pictures: the first latent of each held-out prompt. Inside this page are previews of at most {SIDE} "
            f"pixels a side of the first {min(PROMPTS, len(self.prompts))} of {plural(len(self.prompts), 'prompt')} of "
            "the suite, as many as fit a fixed size: those of the base model and of the seed with the median gain of "
            f"each method, then the same along training, then other seeds ({inside}). All others are read from the "
            "run’s directory, where it lies beside the page."
        )


def collect(analysis: Analysis, budget: int) -> Album:
    """Find the stored pictures and their scores, and choose as many bytes of them as may stand inside the page."""
    run = analysis.run
    rows = run.scores[(run.scores["split"] == HELD_OUT) & (run.scores["variant"] == DEFAULT_VARIANT)]
    base = rows[rows["arm"] == BASE]
    first = (base if len(base) else rows).sort_values("noise_id", kind="stable").drop_duplicates("prompt_id")
    texts = _by(rows.drop_duplicates("prompt_id"), "prompt_id", "prompt")
    noises = _by(first, "prompt_id", "noise_id")
    prompts = tuple((i, str(texts.get(i, i)), int(noises.get(i, 0))) for i in run.prompts(HELD_OUT))
    files = {f"{identity}--{noise}.png": place for place, (identity, _, noise) in enumerate(prompts)}
    reached = rows.drop_duplicates(["cell", "point"])
    spent = {
        (str(cell), str(point)): tuple(map(float, until))
        for cell, point, *until in zip(*(reached[name] for name in ("cell", "point", *SPENT)), strict=True)
    }
    cells = [cell for cell in (run.base, *run.cells) if cell.counts]
    points = {cell.name: _points(run.folder, cell.name, files, spent) for cell in cells}
    scores, base_scores = _scores(analysis, rows, prompts)
    names = list(files)

    def file(stored: Stored) -> Path:
        return run.folder / "cells" / stored.cell / "images" / stored.point / names[stored.prompt]

    inlined = inline(_groups(analysis, points), file, budget=budget)
    return Album(run.base.name, prompts, points, scores, base_scores, inlined)


def _points(folder: Path, cell: str, files: dict[str, int], spent: Spent) -> tuple[Point, ...]:
    """The points of one cell that have pictures, in the order of what was spent, the final one last."""
    place = folder / "cells" / cell / "images"
    names = sorted(entry.name for entry in os.scandir(place) if entry.is_dir()) if place.is_dir() else []
    found = []
    for name in names:
        here = frozenset(files[entry.name] for entry in os.scandir(place / name) if entry.name in files)
        if here and (name == FINAL or (cell, name) in spent):
            found.append(Point(name, spent.get((cell, name), (float("nan"),) * len(SPENT)), here))
    return tuple(sorted(found, key=lambda point: (point.name == FINAL, point.spent[0], point.name)))


def _scores(
    analysis: Analysis, rows: pd.DataFrame, prompts: tuple[tuple[str, str, int], ...]
) -> tuple[dict[tuple[str, str], dict[int, float]], dict[str, dict[int, float]]]:
    places = {(identity, noise): i for i, (identity, _, noise) in enumerate(prompts[:PROMPTS])}
    rows = rows[rows["prompt_id"].isin([identity for identity, _ in places])]
    tuned: dict[tuple[str, str], dict[int, float]] = {}
    base: dict[str, dict[int, float]] = {}
    columns = ("cell", "point", "prompt_id", "noise_id", "score")
    for reward in analysis.run.training_rewards:
        mine = rows[rows["reward"] == reward]
        mine = mine[(mine["training_reward"] == reward) | (mine["arm"] == BASE)]
        for cell, point, prompt, noise, score in zip(*(mine[name].tolist() for name in columns), strict=True):
            if (prompt, noise) in places:
                of_base = cell == analysis.run.base.name
                known = base.setdefault(reward, {}) if of_base else tuned.setdefault((cell, point), {})
                known[places[prompt, noise]] = float(score)
    return tuned, base


def _by(rows: pd.DataFrame, key: str, value: str) -> dict[str, Any]:
    return dict(zip(map(str, rows[key]), rows[value], strict=True))


def _groups(analysis: Analysis, points: dict[str, tuple[Point, ...]]) -> list[Group]:
    """What is wanted inside the page: median seeds and base first, then their training, then the other seeds."""
    run = analysis.run
    chosen, others = [run.base.name], list[str]()
    for reward in run.training_rewards:
        for arm in run.arms:
            median = median_seed(analysis, arm, reward)
            for cell in run.cells_of(arm, reward):
                (chosen if cell.seed == median else others).append(cell.name)
    groups = []
    for kind, cells, final in (
        (CHOSEN, chosen, True), (ALONG, chosen, False), (OTHERS, others, True), (OTHERS_ALONG, others, False),
    ):  # fmt: skip
        for prompt in range(PROMPTS):
            pictures = tuple(
                Stored(cell, point.name, prompt)
                for cell in cells
                for point in points.get(cell, ())
                if (point.name == FINAL) == final and prompt in point.prompts
            )
            if pictures:
                groups.append(Group(kind, pictures))
    return groups


def _mask(prompts: frozenset[int], number: int) -> str:
    return "".join(
        f"{sum(1 << bit for bit in range(4) if 4 * digit + bit in prompts):x}" for digit in range((number + 3) // 4)
    )
