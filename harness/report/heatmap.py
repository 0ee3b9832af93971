"""F4: trained on (rows), evaluated on (columns), beside the correlation of the rewards on base pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from harness.report.analysis import Analysis
from harness.report.captions import Drawn, sample
from harness.report.formatting import decimals, fixed, significant
from harness.report.style import CORRELATION, DIVERGING, GREY, INK
from harness.stats.intervals import Interval
from harness.stats.matrix import reward_correlations

WIDTH, ROW, LOW = 1.08, 0.46, 0.2
ROOMY = 32  # rows: with more, a cell has its estimate alone
HEAD, GAP = 0.85, 0.4
COLUMNS = (
    *("arm", "training_reward", "reward", "gain_base_sd", "low", "high", "adjusted_p"),
    *("n", "prompts", "pictures"),
)


def heatmap(analysis: Analysis, name: str) -> Drawn | None:
    """Blocks of rows, one below the other on the same columns and scale; None without gains.

    One block per arm; with many rows one per training reward, so that arms are compared, and without intervals.
    """
    columns = list(analysis.rewards)
    crowded = len(analysis.run.arms) * len(analysis.run.training_rewards) > ROOMY
    blocks = _blocks(analysis, by_arm=not crowded)
    data = pd.DataFrame(matrix_rows(analysis), columns=list(COLUMNS))
    reach = float(np.nanmax(np.abs(data["gain_base_sd"]))) if data["gain_base_sd"].notna().any() else 0.0
    if not columns or reach == 0.0:
        return None
    correlations = base_correlations(analysis)
    heights = [len(rows) * (LOW if crowded else ROW) for _, rows in blocks] + [len(columns) * 0.3]
    total = HEAD + sum(heights) + GAP * len(blocks) + 0.12
    figure = Figure(figsize=(2.2 + WIDTH * len(columns), total))
    labels = [f"{reward}\n({analysis.rewards[reward].role})" for reward in columns]
    norm, narrow = Normalize(-reach, reach), Normalize(-1, 1)
    top = total - HEAD
    left, width = 1.75 / figure.get_figwidth(), WIDTH * len(columns) / figure.get_figwidth()
    for i, ((title, rows), height) in enumerate(zip(blocks, heights[:-1], strict=True)):
        axes = figure.add_axes((left, (top - height) / total, width, height / total))
        _block(axes, rows, columns, norm, intervals=not crowded)
        axes.set_title(title, pad=36 if i == 0 else 4, fontsize=9.5)
        if i == 0:
            _top_labels(axes, labels)
        top -= height + GAP
    axes = figure.add_axes((left, (top - heights[-1]) / total, width, heights[-1] / total))
    _correlations(axes, correlations, columns, narrow)
    caption = (
        "Top: mean gain on held-out prompts in base-SD units (the spread of the base model's pictures within a "
        f"prompt){', intervals are in the data' if crowded else ', with its 95 % t interval over seed means'}; "
        f"{'one block for each reward trained on' if crowded else 'rows: what was trained on'}, columns: what the "
        f"pictures were scored with; framed: the reward trained on. One colour scale for all ({sample(data).text}). "
        "Bottom: correlation of the rewards over the base model's pictures; correlated rewards make a gain look like "
        "generalisation."
    )
    return Drawn(
        name,
        "Generalisation across rewards",
        figure,
        data,
        caption,
        _alt(analysis),
        width=min(900, 110 * len(columns) + 180),
    )


def matrix_rows(analysis: Analysis) -> list[dict[str, object]]:
    """One row per cell of every matrix."""
    rows: list[dict[str, object]] = []
    for arm, matrix in analysis.matrices.items():
        for i, trained in enumerate(matrix.rows):
            for j, reward in enumerate(matrix.columns):
                gain = analysis.final(arm, trained, reward)
                cell = matrix.cells[i][j]
                rows.append(
                    {
                        "arm": arm,
                        "training_reward": trained,
                        "reward": reward,
                        "gain_base_sd": cell.estimate,
                        "low": cell.low,
                        "high": cell.high,
                        "adjusted_p": matrix.adjusted_p[i, j],
                        "n": cell.n,
                        "prompts": gain.prompts,
                        "pictures": gain.pictures,
                    }
                )
    return rows


def base_correlations(analysis: Analysis) -> np.ndarray:
    """(E, E) correlation of evaluation rewards over the base model's held-out pictures."""
    found = [analysis.gains.base_scores(reward, "held-out") for reward in analysis.rewards]
    keys = sorted({(p, k) for scores in found for p in scores.prompts for k in scores.pictures}, key=str)
    table = np.full((len(found), len(keys)), np.nan)
    for i, scores in enumerate(found):
        rows = {prompt: row for row, prompt in enumerate(scores.prompts)}
        places = {picture: column for column, picture in enumerate(scores.pictures)}
        for j, (prompt, picture) in enumerate(keys):
            if prompt in rows and picture in places:
                table[i, j] = scores.values[0, rows[prompt], places[picture]]
    return reward_correlations(table)


Rows = list[tuple[str, str, tuple[Interval, ...]]]


def _blocks(analysis: Analysis, *, by_arm: bool) -> list[tuple[str, Rows]]:
    """Rows (label, reward trained on, cells): by arm, or by training reward, as where there is one."""
    matrices = analysis.matrices
    rewards = analysis.run.training_rewards
    if len(rewards) == 1 or not by_arm:
        return [
            (f"{analysis.run.relation} {reward}", [(arm, reward, matrix.cells[i]) for arm, matrix in matrices.items()])
            for i, reward in enumerate(rewards)
        ]
    return [
        (arm, [(trained, trained, cells) for trained, cells in zip(matrix.rows, matrix.cells, strict=True)])
        for arm, matrix in matrices.items()
    ]


def _block(axes: Axes, rows: Rows, columns: list[str], norm: Normalize, *, intervals: bool) -> None:
    values = np.array([[cell.estimate for cell in cells] for _, _, cells in rows])
    axes.imshow(np.ma.masked_invalid(values), cmap=DIVERGING, norm=norm, aspect="auto")
    for i, (_, trained, cells) in enumerate(rows):
        for j, cell in enumerate(cells):
            light = abs(norm(cell.estimate) - 0.5) > 0.33 if np.isfinite(cell.estimate) else False
            _cell_text(axes, i, j, cell, "white" if light else INK, interval=intervals)
            if columns[j] == trained and intervals:
                frame = Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, fill=False, edgecolor="black", linewidth=1.6)
                axes.add_patch(frame)
    if not intervals and (trained := rows[0][1]) in columns:  # one frame around the column: all rows have one reward
        place = (columns.index(trained) - 0.48, -0.46)
        axes.add_patch(Rectangle(place, 0.96, len(rows) - 0.08, fill=False, edgecolor="black", linewidth=1.6))
    _bare(axes)
    axes.set_xticks(range(len(columns)), [""] * len(columns))
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])


def _cell_text(axes: Axes, i: int, j: int, cell: Interval, colour: str, *, interval: bool) -> None:
    if not np.isfinite(cell.estimate):
        axes.text(j, i, "–", ha="center", va="center", color=GREY)
        return
    if not interval:
        places = min(decimals(cell.half_width), 2)
        text = fixed(cell.estimate, places, sign=True)
        axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
        return
    if not np.isfinite(cell.half_width):
        text = f"{significant(cell.estimate, 2, sign=True)}\n(n={cell.n})"
    else:
        places = min(decimals(cell.half_width), 2)
        low, high = fixed(cell.low, places, sign=True), fixed(cell.high, places, sign=True)
        text = f"{fixed(cell.estimate, places, sign=True)}\n[{low}, {high}]"
    first, second = text.split("\n")
    axes.text(j, i - 0.02, first, ha="center", va="bottom", fontsize=9, color=colour, fontweight="bold")
    axes.text(j, i + 0.06, second, ha="center", va="top", fontsize=6.5, color=colour)


def _correlations(axes: Axes, table: np.ndarray, columns: list[str], norm: Normalize) -> None:
    axes.imshow(np.ma.masked_invalid(table), cmap=CORRELATION, norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(table):
        text = fixed(float(value), 2)
        axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if abs(value) > 0.6 else INK)
    _bare(axes)
    axes.set_xticks(range(len(columns)), [""] * len(columns))
    axes.set_yticks(range(len(columns)), columns)
    axes.set_title("correlation of rewards over base pictures", pad=4, fontsize=9.5)


def _bare(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _top_labels(axes: Axes, labels: list[str]) -> None:
    axes.xaxis.tick_top()
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    crowded = len(labels) * longest > 140  # neighbours would touch
    axes.set_xticks(range(len(labels)), labels, fontsize=6.2 if crowded else 7.5)
    axes.tick_params(axis="x", length=0, pad=3)


def _alt(analysis: Analysis) -> str:
    parts = []
    for arm, matrix in analysis.matrices.items():
        on, off = significant(matrix.on_target.estimate, sign=True), significant(matrix.off_target.estimate, sign=True)
        parts.append(f"{arm}: {on} base SD on the reward trained on, {off} on the others")
    return "Matrix of gains by training and evaluation reward; mean gains: " + "; ".join(parts) + "."
