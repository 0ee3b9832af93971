"""F5 and F6: what the gain on the training reward costs elsewhere: held-out measures, gold metrics, diversity."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.analysis import DIVERSITY, Analysis
from harness.report.captions import Drawn, sample
from harness.report.formatting import joined, significant
from harness.report.style import BASE_COLOUR, GREY, Look, looks, roomy

COLUMNS = (
    *("training_reward", "arm", "seed", "point", "measure", "gain_on_training_reward", "value", "base"),
    *("n", "prompts", "pictures"),
)


def tradeoffs(analysis: Analysis, name: str) -> Drawn | None:
    """One row of panels per training reward: each witness, then diversity; None where there is nothing to show."""
    rewards = [reward for reward in analysis.run.training_rewards if reward in analysis.rewards]
    diverse = np.isfinite(analysis.gains.base_metric(DIVERSITY))
    panels = [analysis.witnesses(reward) + ([DIVERSITY] if diverse else []) for reward in rewards]
    columns = max(map(len, panels), default=0)
    data = pd.DataFrame(tradeoff_rows(analysis), columns=list(COLUMNS))
    if not columns or data.empty:
        return None
    figure = Figure(figsize=(0.5 + 3.3 * columns, 0.55 + 2.9 * len(rewards)), layout=roomy())
    grid = figure.subplots(len(rewards), columns, squeeze=False)
    look = looks(analysis.run.arms)
    for line, reward, measures in zip(grid, rewards, panels, strict=True):
        for axes in line[len(measures) :]:
            axes.axis("off")
        for axes, measure in zip(line, measures, strict=False):
            mine = data[(data["training_reward"] == reward) & (data["measure"] == measure)]
            _panel(axes, analysis, reward, measure, mine, look)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(max(len(labels), 1), 7))
    caption = (
        "Gain on the training reward (right is more) against measures that were not trained on (up is better), on "
        "held-out prompts. Lines: mean over seeds along training; large markers: means at the end of the budget; dots: "
        f"training seeds there ({sample(data[data['measure'] != DIVERSITY]).text}); black diamond: base model. Where "
        "the line turns down while it moves right, the reward is being over-optimised. Dotted: as much gain as on the "
        "training reward. Vendi: effective number of different pictures among those of one prompt, mean over prompts."
    )
    title = "What the gain costs: held-out measures, gold metrics, diversity"
    return Drawn(name, title, figure, data, caption, _alt(data))


def tradeoff_rows(analysis: Analysis) -> list[dict[str, object]]:
    """One row per arm, seed, point and measure; gains in the measure's unit, diversity as it is."""
    rows: list[dict[str, object]] = []
    for reward in analysis.run.training_rewards:
        for arm in analysis.run.arms:
            proxy = analysis.gains.curve(arm, reward, reward)
            for measure in analysis.witnesses(reward):
                other = analysis.gains.curve(arm, reward, measure)
                if other.values.shape != proxy.values.shape:
                    continue
                for (i, j), value in np.ndenumerate(other.values):
                    point = "final" if j == other.values.shape[1] - 1 else str(j)
                    row = _row(
                        reward, arm, proxy.seeds[i], point, measure, float(proxy.values[i, j]), float(value), 0.0
                    )
                    rows.append(row | {"n": len(proxy.seeds), "prompts": other.prompts, "pictures": other.pictures})
            final, base = analysis.final(arm, reward), analysis.gains.base_metric(DIVERSITY)
            for seed, gain, value in zip(final.seeds, final.values, analysis.diversity(arm, reward), strict=True):
                if np.isfinite(base) and np.isfinite(value):
                    rows.append(
                        _row(reward, arm, seed, "final", DIVERSITY, gain, value, base) | {"n": final.runs.planned}
                    )
    return rows


def _row(
    reward: str, arm: str, seed: int, point: str, measure: str, gain: float, value: float, base: float
) -> dict[str, object]:
    values = (reward, arm, seed, point, measure, gain, value, base, 0, 0, 0)
    return dict(zip(COLUMNS, values, strict=True))


def _panel(
    axes: Axes, analysis: Analysis, reward: str, measure: str, rows: pd.DataFrame, look: dict[str, Look]
) -> None:
    axes.grid(axis="both")
    base = float(rows["base"].iloc[0]) if len(rows) else 0.0
    axes.axhline(base, color=BASE_COLOUR, linewidth=0.8, zorder=1)
    for arm, mine in rows.groupby("arm", sort=False):
        _arm(axes, str(arm), mine, base, look[str(arm)])
    axes.plot(0, base, "D", color=BASE_COLOUR, markersize=6, zorder=2.5, label="base model")
    if measure == DIVERSITY:
        axes.set_title("diversity within prompts")
        axes.set_ylabel("Vendi score →")
    else:
        axes.set_title(f"{measure} ({analysis.rewards[measure].role})")
        axes.set_ylabel(f"gain ({analysis.unit(measure)}) →")
    if measure != DIVERSITY and analysis.unit(measure) == analysis.unit(reward):
        low, high = axes.get_xlim()
        axes.plot([0, high], [0, high], ":", color=GREY, linewidth=1.2, zorder=1)
        axes.set_xlim(low, high)
    axes.set_xlabel(f"gain on {reward} ({analysis.unit(reward)}) →")


def _arm(axes: Axes, arm: str, rows: pd.DataFrame, base: float, look: Look) -> None:
    points = [found for _, found in rows.groupby("point", sort=False)]
    x = [_mean(found["gain_on_training_reward"]) for found in points]
    y = [_mean(found["value"]) for found in points]
    last = points[-1]
    axes.plot([0, *x], [base, *y], look.line, linewidth=1.6, color=look.colour, zorder=3)
    axes.plot(x[:-1], y[:-1], look.marker, markersize=3.5, linestyle="none", color=look.colour, zorder=3)
    axes.plot(
        last["gain_on_training_reward"], last["value"], look.marker, markersize=4, alpha=0.55, markeredgewidth=0,
        linestyle="none", color=look.colour, zorder=3,
    )  # fmt: skip
    axes.plot(
        x[-1:], y[-1:], look.marker, markersize=9, markeredgecolor="white", markeredgewidth=1.0, linestyle="none",
        color=look.colour, zorder=4, label=arm,
    )  # fmt: skip


def _mean(values: pd.Series) -> float:
    return float(values.mean())


def _alt(data: pd.DataFrame) -> str:
    last = data[data["point"] == "final"]
    parts = []
    for (reward, measure, arm), rows in last.groupby(["training_reward", "measure", "arm"], sort=False):
        change = significant(float(rows["value"].mean() - rows["base"].iloc[0]), sign=True)
        parts.append(f"{arm} trained on {reward}: {measure} {change}")
    return "Change of measures that were not trained on, at the end: " + joined(parts) + "."
