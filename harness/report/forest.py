"""F1: every gain with its interval and every seed as a dot."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from harness.report.analysis import Analysis
from harness.report.captions import INTERVAL, Drawn, sample
from harness.report.formatting import decimals, estimate, fixed, joined, significant
from harness.report.gains import Gain
from harness.report.style import GREY, INK, Look, looks, roomy, zero_line

SPREAD = 0.16


def forest(analysis: Analysis, name: str) -> Drawn:
    """One row of panels per training reward: the reward itself, its held-out measure, the gold metrics."""
    rewards = [r for r in analysis.run.training_rewards if r in analysis.rewards]
    panels = [[reward, *analysis.witnesses(reward)] for reward in rewards]
    arms = analysis.run.arms
    height = 0.95 + (0.5 if len(arms) <= 8 else 0.34) * len(arms)
    columns = max(map(len, panels), default=1)
    figure = Figure(figsize=(1.3 + 3.1 * columns, max(height * len(panels), 1.2) + 0.1), layout=roomy())
    grid = figure.subplots(max(len(panels), 1), columns, squeeze=False)
    look = looks(arms)
    rows: list[dict[str, object]] = []
    for i, line in enumerate(panels):
        for j in range(columns):
            axes = grid[i, j]
            if j >= len(line):
                axes.axis("off")
                continue
            gains = [analysis.final(arm, line[0], line[j]) for arm in arms]
            _panel(axes, analysis, gains, look, labels=j == 0)
            rows += [row for gain in gains for row in forest_rows(gain, analysis.unit(line[j]))]
    data = pd.DataFrame(rows, columns=list(FOREST_COLUMNS))
    caption = (
        "Gain over the base model (the line at 0) on held-out prompts, with the same prompts and latents. Bar: "
        f"{INTERVAL}; tick: mean; dots: training seeds ({sample(data).text}); hollow dots: diverged runs, counted "
        "with their last finite checkpoint. "
    )
    caption += (
        "Left: the reward that was trained on; right of it: measures that were not."
        if analysis.run.relation == "trained on"
        else "Left: the first judge; right of it: the others."
    )
    if analysis.run.inference:
        caption += " †: changes no weights."
    if analysis.run.given:
        caption += " ‡: made elsewhere."
    return Drawn(name, "Gains over the base model", figure, data, caption, _alt(analysis, panels))


FOREST_COLUMNS = (
    *("training_reward", "reward", "arm", "seed", "state", "gain", "gain_base_sd", "mean", "low", "high"),
    *("n", "prompts", "pictures", "base_mean", "base_sd", "unit"),
)


def forest_rows(gain: Gain, unit: str = "") -> list[dict[str, object]]:
    """One row per seed, with the interval that they give repeated."""
    interval = gain.interval
    return [
        {
            "training_reward": gain.training_reward,
            "reward": gain.reward,
            "arm": gain.arm,
            "seed": seed,
            "state": state,
            "gain": value,
            "gain_base_sd": in_sd,
            "mean": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "n": interval.n,
            "prompts": gain.prompts,
            "pictures": gain.pictures,
            "base_mean": gain.base_mean,
            "base_sd": gain.sd,
            "unit": unit,
        }
        for seed, state, value, in_sd in zip(gain.seeds, gain.states, gain.values, gain.standardised, strict=True)
    ]


def _panel(axes: Axes, analysis: Analysis, gains: list[Gain], look: dict[str, Look], *, labels: bool) -> None:
    axes.grid(axis="x")
    zero_line(axes, vertical=True)
    for y, gain in enumerate(gains):
        _arm(axes, y, gain, look[gain.arm])
    axes.set_ylim(len(gains) - 0.45, -0.62)
    axes.set_yticks(range(len(gains)) if labels else [], [_label(analysis, gain.arm) for gain in gains] * labels)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.spines["left"].set_visible(False)
    axes.use_sticky_edges = False
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    first = gains[0]
    info = analysis.rewards[first.reward]
    role = analysis.run.relation.removesuffix(" by") if first.reward == first.training_reward else info.role
    axes.set_title(first.reward, pad=16)
    base = significant(first.base_mean)
    about = f"{role}; base model {base}"  # a fixed distance below the title, whatever the height of the panel
    axes.annotate(about, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=GREY)
    axes.set_xlabel(f"gain ({info.unit}) →")


def _label(analysis: Analysis, arm: str) -> str:
    return f"{arm}{' †' * (arm in analysis.run.inference)}{' ‡' * (arm in analysis.run.given)}"


def _arm(axes: Axes, y: int, gain: Gain, look: Look) -> None:
    interval = gain.interval
    if np.isfinite(interval.half_width):
        axes.barh(y, 2 * interval.half_width, left=interval.low, height=0.5, color=look.colour, alpha=0.28, zorder=2)
    if np.isfinite(interval.estimate):
        axes.plot([interval.estimate] * 2, [y - 0.25, y + 0.25], color=INK, linewidth=2, zorder=3)
        text = fixed(interval.estimate, decimals(interval.half_width), sign=True)
        label = axes.annotate(
            text,
            (interval.estimate, y - 0.27),
            (0, 1),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    else:
        axes.text(0.5, y, "no data", transform=axes.get_yaxis_transform(), ha="center", va="center", color=GREY)
    heights = y + np.linspace(-SPREAD, SPREAD, max(len(gain.values), 1)) if len(gain.values) > 1 else [y]
    broken = np.array([state == "diverged" for state in gain.states], dtype=bool)
    for chosen, face, edge, width in (
        (~broken, look.colour, "white", 0.7),
        (broken, "white", look.colour, 1.2),
    ):
        if chosen.any():
            axes.plot(
                gain.values[chosen], np.asarray(heights)[chosen], look.marker, markersize=5.5, markerfacecolor=face,
                markeredgecolor=edge, markeredgewidth=width, linestyle="none", zorder=4,
            )  # fmt: skip


def _alt(analysis: Analysis, panels: list[list[str]]) -> str:
    parts = []
    for line in panels:
        for reward in line:
            found = [f"{arm} {estimate(analysis.final(arm, line[0], reward).interval)}" for arm in analysis.run.arms]
            parts.append(f"gain on {reward} {analysis.run.relation} {line[0]}: {joined(found)}")
    return "Forest plot with one dot per seed; " + "; ".join(parts) + "."
