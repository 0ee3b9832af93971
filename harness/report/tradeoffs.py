"""F5 and F6: what the gain on the training reward costs elsewhere: held-out measures, gold metrics, diversity."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.report.analysis import DIVERSITY, Analysis
from harness.report.captions import Drawn, sample
from harness.report.formatting import joined, significant
from harness.report.records import FINAL
from harness.report.style import BASE_COLOUR, GREY, Look, looks, roomy
from harness.watching import END, START

DRIFT = "drift_latent_rms"
MEASURES = {
    DIVERSITY: ("diversity within prompts", "Vendi score →"),
    "pairwise_distance": ("distance within prompts", "mean pairwise distance →"),
    DRIFT: ("drift from the base model", "latent RMS ← less drift"),
}
COLUMNS = (
    *("training_reward", "arm", "seed", "point", "measure", "gain_on_training_reward", "value", "base"),
    *("n", "prompts", "pictures"),
)


def tradeoffs(analysis: Analysis, name: str) -> Drawn | None:
    """One row of panels per training reward: each witness, then diversity; None where there is nothing to show."""
    rewards = [reward for reward in analysis.run.training_rewards if reward in analysis.rewards]
    measured = [name for name in MEASURES if analysis.gains.metric_points(name)]
    panels = [analysis.witnesses(reward) + measured for reward in rewards]
    columns = max(map(len, panels), default=0)
    data = pd.DataFrame(tradeoff_rows(analysis), columns=list(COLUMNS))
    if not columns or data.empty:
        return None
    figure = Figure(figsize=(0.5 + 2.9 * columns, 0.55 + 2.9 * len(rewards)), layout=roomy())
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
        f"training seeds there ({sample(data[data['n'] * data['prompts'] > 0]).text}); black diamond: base model; "
        "arrow: the direction of training. Where "
        "the line turns down while it moves right, the reward is being over-optimised. Dotted: as much gain as on the "
        "training reward. Vendi: effective number of different pictures among those of one prompt, pairwise distance: "
        "mean cosine distance between these, both means over prompts; drift: distance of final latents to the base "
        "model's (root mean square), on the prompts of these measures."
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
            rows += _measured(analysis, arm, reward)
    return rows


def _measured(analysis: Analysis, arm: str, reward: str) -> Iterator[dict[str, object]]:
    """Diversity and drift at every point at which they were taken, beside the gain on that point's own pictures."""
    for measure in MEASURES:
        points = analysis.gains.metric_points(measure)
        start = START if END in points else FINAL  # the base model on the same pictures
        base = 0.0 if measure == DRIFT else analysis.gains.base_metric(measure, point=start)
        for point in points:
            gains = analysis.gains.final(arm, reward, reward, point=point)
            values = analysis.gains.metric(arm, reward, measure, point=point)
            for seed, gain, value in zip(gains.seeds, gains.values, values, strict=True):
                if np.isfinite(base) and np.isfinite(value) and np.isfinite(gain):
                    shown = FINAL if point == END else point
                    row = _row(reward, arm, seed, shown, measure, float(gain), float(value), base)
                    yield row | {"n": gains.runs.planned}


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
    if measure in MEASURES:
        title, label = MEASURES[measure]
        axes.set_title(title)
        axes.set_ylabel(label)
    else:
        axes.set_title(f"{measure} ({analysis.rewards[measure].role})")
        axes.set_ylabel(f"gain ({analysis.unit(measure)}) →")
    if measure not in MEASURES and analysis.unit(measure) == analysis.unit(reward):
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
    start = (x[-2], y[-2]) if len(x) > 1 else (0.0, base)
    if np.isfinite([*start, x[-1], y[-1]]).all() and start != (x[-1], y[-1]):
        arrow = {"arrowstyle": "-|>", "color": look.colour, "shrinkA": 0, "shrinkB": 5, "linewidth": 1.2}
        axes.annotate("", (x[-1], y[-1]), start, arrowprops=arrow, zorder=3.5)
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
