"""F2, F7 and F8: how far methods are apart, how often one seed beats another, and how gains are distributed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from harness.report.analysis import MARGIN, Analysis
from harness.report.captions import Drawn
from harness.report.formatting import estimate, fixed, joined, plural
from harness.report.style import DIVERGING, GREY, INK, PALE, looks, roomy, zero_line
from harness.stats.verdict import Judgement

PAIRS = 15
TALL = 10  # inches
NUMBERED = 12
TRAINING, POOLED = "training_reward", "all training rewards"
COLUMNS = (
    *("training_reward", "arm", "reference", "difference", "low", "high", "simultaneous_low", "simultaneous_high"),
    *("detectable", "margin", "adjusted_p", "verdict", "n"),
)


def differences(analysis: Analysis, name: str) -> Drawn | None:
    """One panel for the primary family, one for each training reward; None with a single method."""
    blocks = [(POOLED, list(analysis.primary))] if len(analysis.run.training_rewards) > 1 else []
    blocks += [(reward, _shown(analysis, found)) for reward, found in analysis.secondary.items()]
    blocks = [(title, [j for j in found if np.isfinite(j.difference.estimate)]) for title, found in blocks]
    blocks = [(title, found) for title, found in blocks if found]
    if not blocks:
        return None
    heights = [0.75 + 0.27 * len(found) for _, found in blocks]
    figure = Figure(figsize=(9.0, sum(heights) + 0.3), layout=roomy())
    grid = figure.subplots(len(blocks), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (title, found) in zip(grid, blocks, strict=True):
        _panel(axes, title, found)
    shown = [(j.difference, j.detectable) for _, found in blocks for j in found]
    inner = [x for interval, _ in shown for x in (interval.estimate, interval.low, interval.high) if np.isfinite(x)]
    reach = 1.08 * max([2 * MARGIN, *np.abs(inner)])
    grid[-1].set_xlim(-reach, reach)
    for axes in grid:  # the numbers of the last panel are far away in a tall figure
        axes.tick_params(labelbottom=sum(heights) > TALL or axes is grid[-1])
    grid[-1].set_xlabel("difference of gains (base SD): right of 0 the first method gains more →")
    data = pd.DataFrame([_row(title, j) for title, found in blocks for j in found], columns=list(COLUMNS))
    seeds = sorted({j.difference.n for _, found in blocks for j in found})
    caption = (
        "Difference of the gains on the training reward on held-out prompts. Bar: 95 % t interval over the means of "
        f"training seeds (n = {joined([str(n) for n in seeds])}), not adjusted; thin line: Bonferroni over the family; "
        f"shaded: ±{MARGIN:g} base SD, within which methods count as equivalent; grey whisker around 0: the smallest "
        "difference that 80 % power finds at these seeds and this family. Lines that leave the "
        "picture end outside, at the numbers in the data. Filled: better or worse by the declared test."
    )
    number = max(len(found) for found in analysis.secondary.values())
    if number > PAIRS:
        caption += f" Of {number} pairs for each reward those with {analysis.run.reference}; all are in the tables."
    return Drawn(name, "Differences between methods", figure, data, caption, _alt(blocks))


def _shown(analysis: Analysis, found: Sequence[Judgement]) -> list[Judgement]:
    """All pairs, or those with the reference where there are too many to read."""
    reference = analysis.run.reference
    return [j for j in found if len(found) <= PAIRS or reference in (j.arm, j.reference)]


def _row(title: str, j: Judgement) -> dict[str, object]:
    values = (
        *(title, j.arm, j.reference, j.difference.estimate, j.difference.low, j.difference.high),
        *(j.simultaneous.low, j.simultaneous.high, j.detectable, MARGIN, j.adjusted_p, j.verdict.value),
        j.difference.n,
    )
    return dict(zip(COLUMNS, values, strict=True))


def _panel(axes: Axes, title: str, found: Sequence[Judgement]) -> None:
    axes.axvspan(-MARGIN, MARGIN, color=PALE, zorder=0)
    axes.grid(axis="x")
    zero_line(axes, vertical=True)
    for y, j in enumerate(found):
        interval, wide = j.difference, j.simultaneous
        if np.isfinite(j.detectable):
            ends = [-j.detectable, j.detectable]
            axes.plot(ends, [y + 0.3] * 2, "|-", color=GREY, linewidth=0.6, markersize=4, zorder=2)
        if np.isfinite(wide.half_width):
            axes.plot([wide.low, wide.high], [y, y], color=INK, linewidth=0.8, zorder=2)
        if np.isfinite(interval.half_width):
            axes.plot([interval.low, interval.high], [y, y], color=INK, linewidth=4, solid_capstyle="butt", zorder=3)
        decided = j.verdict.value in ("better", "worse")
        axes.plot(
            interval.estimate, y, "o", color=INK, markerfacecolor=INK if decided else "white", markersize=6, zorder=4
        )
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_yticks(range(len(found)), [f"{j.arm} − {j.reference}" for j in found])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(title)


def _alt(blocks: Sequence[tuple[str, Sequence[Judgement]]]) -> str:
    parts = [
        f"on {title}: " + joined([f"{j.arm} minus {j.reference} {estimate(j.difference)}" for j in found[:PAIRS]])
        for title, found in blocks
    ]
    return "Differences of gains in base SD, " + "; ".join(parts) + "."


def probabilities(analysis: Analysis, name: str) -> Drawn | None:
    """F7: for each training reward the chance that a seed of the row's method beats one of the column's."""
    arms = analysis.run.arms
    blocks = {reward: found for reward, found in analysis.secondary.items() if reward in analysis.rewards and found}
    if not blocks or len(arms) < 3:
        return None
    side = 1.6 + max(0.3, 0.46 - 0.01 * len(arms)) * len(arms)
    columns = min(len(blocks), 2)
    lines = -(-len(blocks) // columns)
    figure = Figure(figsize=(side * columns + 0.4, (side - 0.4) * lines), layout=roomy())
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    rows: list[dict[str, object]] = []
    for axes, (reward, found) in zip(grid, blocks.items(), strict=False):
        table = np.full((len(arms), len(arms)), np.nan)
        for j in found:
            first, second, p = arms.index(j.arm), arms.index(j.reference), j.probability
            table[first, second], table[second, first] = p.estimate, 1 - p.estimate
            rows.append({TRAINING: reward, "arm": j.arm, "reference": j.reference, "p_better": p.estimate})
            rows[-1] |= {"low": p.low, "high": p.high, "n": p.n}
        _grid(axes, table, list(arms), reward)
    for axes in grid[len(blocks) :]:
        axes.axis("off")
    data = pd.DataFrame(rows)
    caption = (
        "Chance that a training seed of the method of the row gains more on the training reward than one of the method "
        "of the column, over all pairs of seeds (ties count half). Blue: the row's is better; white: one half. "
        "Intervals (Newcombe) are in the data and the tables of pairs; with few seeds they are wide."
    )
    wins = [f"{arm} {fixed(float(value), 2)}" for arm, value in zip(arms, _mean_wins(rows, arms), strict=True)]
    alt = "Probability that one method's seed beats another's; mean over opponents and rewards: " + joined(wins) + "."
    return Drawn(name, "How often one seed beats another", figure, data, caption, alt, width=min(900, int(side * 90)))


def _mean_wins(rows: Sequence[dict[str, object]], arms: Sequence[str]) -> list[float]:
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for row in rows:
        p = float(str(row["p_better"]))
        found[str(row["arm"])].append(p)
        found[str(row["reference"])].append(1 - p)
    return [float(np.nanmean(values)) if np.isfinite(values).any() else float("nan") for values in found.values()]


def _grid(axes: Axes, table: np.ndarray, arms: list[str], title: str) -> None:
    axes.imshow(np.ma.masked_invalid(table), cmap=DIVERGING, norm=Normalize(0, 1), aspect="auto")
    if len(arms) <= NUMBERED:
        for (i, j), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "white" if abs(value - 0.5) > 0.33 else INK
                axes.text(j, i, fixed(float(value), 2), ha="center", va="center", fontsize=7.5, color=colour)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(range(len(arms)), arms, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_yticks(range(len(arms)), arms, fontsize=7)
    axes.set_title(title)


def profile(analysis: Analysis, name: str) -> Drawn | None:
    """F8: the share of runs whose gain exceeds each level; None with fewer than three training rewards."""
    rewards = [reward for reward in analysis.run.training_rewards if reward in analysis.rewards]
    if len(rewards) < 3:
        return None
    gains = {arm: [analysis.final(arm, reward).standardised for reward in rewards] for arm in analysis.run.arms}
    known = {arm: [v[np.isfinite(v)] for v in found] for arm, found in gains.items()}
    known = {arm: found for arm, found in known.items() if all(len(values) for values in found)}
    if not known:
        return None
    levels = np.unique(np.concatenate([values for found in known.values() for values in found]))
    figure = Figure(figsize=(8.5, 3.6), layout=roomy())
    axes = figure.subplots()
    axes.grid(axis="both")
    look = looks(analysis.run.arms)
    rows: list[dict[str, object]] = []
    for arm, found in known.items():
        share = np.mean([(values[:, None] >= levels).mean(axis=0) for values in found], axis=0)
        drawn = look[arm]
        every = np.linspace(0, len(levels) - 1, 6).astype(int).tolist()
        axes.step(
            levels, share, drawn.line, where="pre", color=drawn.colour, linewidth=1.6, label=arm,
            marker=drawn.marker, markersize=4, markevery=every,
        )  # fmt: skip
        rows += [
            {"arm": arm, "gain_base_sd": float(x), "share": float(y), "n": sum(map(len, found))}
            for x, y in zip(levels, share, strict=True)
        ]
    axes.set_xlabel("gain on the training reward (base SD) →")
    axes.set_ylabel("share of runs with at least this gain →")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    caption = (
        f"Share of training runs whose final gain on the reward they were trained on reaches each level, on held-out "
        f"prompts, equal weights for the {plural(len(rewards), 'training reward')} (performance profile, Agarwal et "
        "al. 2021). A curve further right and higher is better; curves that cross order the methods differently at "
        "different levels. Without bands: bootstrap bands of so few seeds are too narrow."
    )
    medians = [f"{arm} {fixed(float(np.median(np.concatenate(found))), 2)}" for arm, found in known.items()]
    alt = "Performance profiles; median gain over all runs in base SD: " + joined(medians) + "."
    return Drawn(name, "How gains are distributed over runs", figure, pd.DataFrame(rows), caption, alt)
