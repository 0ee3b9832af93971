"""F3: gain against what was spent, in three currencies."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from harness.report.analysis import Analysis
from harness.report.captions import Drawn, sample
from harness.report.formatting import estimate, joined
from harness.report.gains import SPENT, Curve
from harness.report.style import BASE_COLOUR, GREY, Look, looks, roomy, zero_line
from harness.stats.curves import band
from harness.stats.intervals import Interval

AXES = {
    "queries": "reward queries (pictures scored)",
    "denoiser_rows": "denoiser rows (all kinds)",
    "train_seconds": "training time (s)",
}
COLUMNS = (
    *("training_reward", "arm", "seed", "point", *SPENT, "gain", "mean", "low", "high"),
    *("n", "prompts", "pictures", "unit"),
)


def learning_curves(analysis: Analysis, name: str) -> Drawn | None:
    """One row of panels per training reward; None where no cell was evaluated along training."""
    arms = [arm for arm in analysis.run.arms if arm not in analysis.run.untrained]
    curves = {
        reward: [analysis.gains.curve(arm, reward, reward) for arm in arms]
        for reward in analysis.run.training_rewards
        if reward in analysis.rewards
    }
    if not any(curve.values.shape[1] > 1 and curve.seeds for line in curves.values() for curve in line):
        return None
    figure = Figure(figsize=(10.4, 0.6 + 2.75 * len(curves)), layout=roomy())
    grid = figure.subplots(len(curves), len(SPENT), squeeze=False, sharey="row")
    look = looks(analysis.run.arms)
    rows: list[dict[str, object]] = []
    for line, (reward, found) in zip(grid, curves.items(), strict=True):
        for axes, currency in zip(line, SPENT, strict=True):
            _panel(axes, currency, found, look)
        line[0].set_title(reward)
        line[0].set_ylabel(f"gain ({analysis.unit(reward)}) →")
        rows += [row for curve in found for row in curve_rows(curve, analysis.unit(reward))]
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], color=BASE_COLOUR, linewidth=1.2))
    labels.append("base model")
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 7))
    data = pd.DataFrame(rows, columns=list(COLUMNS))
    caption = (
        "Gain on the training reward on held-out prompts against what training had really spent. Thin: one training "
        "seed; thick: mean over seeds; band: pointwise 95 % t interval over seeds (all points hold together less "
        f"often). {sample(data).text}: the pictures that all points share, fewer than in the final evaluation. The "
        "line at 0 is the base model. Claims rest on the final gains, not on the curves."
    )
    if analysis.run.untrained:
        caption += f" Not trained, and so without a curve: {joined(list(analysis.run.untrained))}."
    return Drawn(name, "Gain against what was spent", figure, data, caption, _alt(curves))


def curve_rows(curve: Curve, unit: str = "") -> list[dict[str, object]]:
    """One row per seed and grid point, with the point's interval repeated."""
    intervals = bands(curve)
    return [
        {
            "training_reward": curve.training_reward,
            "arm": curve.arm,
            "seed": seed,
            "point": j,
            **{currency: curve.spent[currency][i, j] for currency in SPENT},
            "gain": curve.values[i, j],
            "mean": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "n": interval.n,
            "prompts": curve.prompts,
            "pictures": curve.pictures,
            "unit": unit,
        }
        for j, interval in enumerate(intervals)
        for i, seed in enumerate(curve.seeds)
    ]


def bands(curve: Curve) -> tuple[Interval, ...]:
    """Pointwise intervals of a curve; none without seeds."""
    return band(curve.values) if curve.seeds else ()


def centre(values: np.ndarray) -> np.ndarray:
    """(G,) mean over the seeds that have a value; NaN where none has."""
    finite = np.isfinite(values)
    total = np.where(finite, values, 0.0).sum(axis=0)
    number = finite.sum(axis=0)
    return np.asarray(np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0))


def _panel(axes: Axes, currency: str, curves: list[Curve], look: dict[str, Look]) -> None:
    axes.grid(axis="both", which="major")
    zero_line(axes, vertical=False)
    ticks: set[float] = set()
    shade = 0.15 if len(curves) <= 3 else 0.08
    for curve in curves:
        x = curve.spent[currency]
        if not curve.seeds or not (x > 0).any():
            continue
        drawn = look[curve.arm]
        gap = np.full((len(x), 1), np.nan)  # one broken line: a figure of many lines takes long to draw
        seeds = [np.hstack([values, gap]).ravel() for values in (x, curve.values)]
        axes.plot(*seeds, color=drawn.colour, linewidth=0.8, alpha=0.45 if len(curves) <= 8 else 0.25, zorder=2)
        intervals = bands(curve)
        middle = centre(x)
        low, high = [v.low for v in intervals], [v.high for v in intervals]
        axes.fill_between(middle, low, high, color=drawn.colour, alpha=shade, linewidth=0)
        axes.plot(
            middle, [v.estimate for v in intervals], drawn.line, color=drawn.colour, marker=drawn.marker, markersize=5,
            markeredgecolor="white", markeredgewidth=0.6, linewidth=2.2, label=curve.arm, zorder=3,
        )  # fmt: skip
        ticks |= {float(v) for v in middle if np.isfinite(v)}
    _log_axis(axes, currency, sorted(ticks))


def _log_axis(axes: Axes, currency: str, seen: list[float]) -> None:
    axes.set_xlabel(AXES[currency])
    if not seen or seen[0] <= 0:
        return
    axes.set_xscale("log", base=2 if currency == "queries" else 10)
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if currency == "queries" and len(seen) <= 6:
        axes.set_xticks(seen)
        axes.xaxis.set_minor_locator(NullLocator())
    elif seen[-1] / seen[0] < 300:
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.tick_params(axis="x", which="minor", color=GREY, length=2)


def _tick(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _alt(curves: dict[str, list[Curve]]) -> str:
    parts = []
    for reward, line in curves.items():
        ends = [f"{curve.arm} {estimate(bands(curve)[-1])}" for curve in line if curve.seeds]
        parts.append(f"gain on {reward} at the end of the budget: {joined(ends)}")
    return "Learning curves against reward queries, denoiser rows and seconds; " + "; ".join(parts) + "."
