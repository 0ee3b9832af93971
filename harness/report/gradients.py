"""What the gradient probes of a run say: whether gradients grow towards the noise, and how much estimators scatter.

A training seed is one observation: pictures are summarised within it (median, 95th percentile), then logarithms are
averaged over seeds. Gradients that are not finite have no place in a median; their share is said beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from harness.errors import UserError
from harness.report import formatting as f
from harness.report.captions import Drawn
from harness.report.style import Look, looks, roomy
from harness.stats.intervals import Interval, seed_t

Norm = Literal["latents", "adapter"]
Unit = Literal["requests", "rows", "queries"]
NORMS, VARIANCE = "gradient-norms", "gradient-variance"
POINTS = ("start", "middle", "end")
TOTAL = "norm-adapter-total"
DRAWN = {"norm-adapter": "‖dr/dθ‖, θ in this step", "norm-latents": "‖dr/dx‖, x entering it"}
KEYS = ["training_reward", "arm", "point", "guidance", "quantity", "seed", "step", "t"]
NAN = float("nan")


# ------------------------------------------------------------------ one number per seed


def log_norm(
    probes: pd.DataFrame,
    arm: str,
    *,
    training_reward: str,
    point: str,
    guidance: float,
    norm: Norm,
    step: int | None = None,
) -> dict[int, float]:
    """Natural logarithm of the median over pictures of a gradient norm, by seed; NaN where there is none above zero.

    Args:
        probes: Rows of `probes.parquet`.
        arm: Whose weights.
        training_reward: What it was trained on.
        point: Of training.
        guidance: Of the chain.
        norm: By the latents that enter a step, or by the adapter in it.
        step: Sampling step from 0; None: the adapter in all steps together.

    Raises:
        UserError: The gradient by the latents of all steps together was asked for.
    """
    if step is None and norm == "latents":
        raise UserError("a gradient norm by the latents needs a step; give one (0: most noise), or norm: adapter")
    name = TOTAL if step is None else f"norm-{norm}"
    rows = profiles(at(probes, training_reward, point, arm, guidance), name)
    rows = rows[rows["step"] == (step or 0)]
    return {int(seed): float(value) for seed, value in zip(rows["seed"], logarithms(rows["median"]), strict=True)}


def log_growth(
    probes: pd.DataFrame,
    arm: str,
    *,
    training_reward: str,
    point: str,
    guidance: float,
    norm: Norm = "latents",
) -> dict[int, float]:
    """Change of the logarithm of the median norm per step towards the noise, by seed: least squares over the steps."""
    rows = profiles(at(probes, training_reward, point, arm, guidance), f"norm-{norm}")
    return {int(str(seed)): _slope(mine) for seed, mine in rows.groupby("seed")}


def log_relative_variance(
    probes: pd.DataFrame, estimator: str, *, at_arm: str, training_reward: str, point: str, per: Unit | None = "rows"
) -> dict[int, float]:
    """Logarithm of variance * rows / squared mean, by seed; NaN where the estimate of the squared mean is not positive.

    `per` takes another unit of cost than denoiser rows; None: of one iteration, whatever it costs.
    """
    values = by_seed(at(probes, training_reward, point, at_arm), estimator)
    columns = ["variance", "squared-mean", *([per] if per else [])]
    found = {}
    for seed, row in values.reindex(columns=columns).iterrows():
        positive = row["squared-mean"] > 0 and row["variance"] > 0
        cost = row[per] if per else 1.0
        found[int(str(seed))] = float(np.log(row["variance"] * cost / row["squared-mean"])) if positive else NAN
    return found


def profiles(probes: pd.DataFrame, *quantities: str) -> pd.DataFrame:
    """Median and 95th percentile over pictures by `KEYS`, how many pictures there were, and how many were finite."""
    kept = probes[(probes["probe"] == NORMS) & probes["quantity"].isin(quantities)]
    finite = kept["value"].astype("float64").where(np.isfinite(kept["value"].astype("float64")))
    groups = kept.assign(value=finite).groupby(KEYS)["value"]
    parts = {
        "median": groups.median(),
        "p95": groups.quantile(0.95),
        "pictures": groups.size(),
        "finite": groups.count(),
    }
    return pd.DataFrame(parts).reset_index()


def at(
    probes: pd.DataFrame, training_reward: str, point: str, arm: str | None = None, guidance: float | None = None
) -> pd.DataFrame:
    """The rows of one training reward and point; of one arm's weights, and one guidance."""
    kept = (probes["training_reward"] == training_reward) & (probes["point"] == point)
    if arm is not None:
        kept &= probes["arm"] == arm
    if guidance is not None:
        kept &= np.isclose(probes["guidance"].astype("float64"), guidance)
    return probes[kept]


def by_seed(probes: pd.DataFrame, estimator: str) -> pd.DataFrame:
    """Quantities of an estimator's gradient, a row for each seed."""
    rows = probes[(probes["probe"] == VARIANCE) & (probes["estimator"] == estimator)]
    return rows.pivot(index="seed", columns="quantity", values="value")


def logarithms(values: pd.Series) -> np.ndarray:
    """Natural logarithms; NaN where a value is not above zero."""
    numbers = values.to_numpy(dtype=np.float64)
    return np.asarray(np.log(numbers, out=np.full(numbers.shape, NAN), where=numbers > 0))


def _slope(rows: pd.DataFrame) -> float:
    heights = logarithms(rows["median"])
    steps = rows["step"].to_numpy(dtype=np.float64)
    known = np.isfinite(heights)
    if known.sum() < 2:
        return NAN
    return float(-np.polyfit(steps[known], heights[known], 1)[0])


# ------------------------------------------------------------------ what a run has


def points_of(probes: pd.DataFrame, training_reward: str, probe: str) -> list[str]:
    """The points of training that were measured, in order."""
    mine = probes[(probes["training_reward"] == training_reward) & (probes["probe"] == probe)]
    seen = set(mine["point"])
    return [point for point in POINTS if point in seen]


def guidances_of(probes: pd.DataFrame, training_reward: str) -> list[float]:
    """Guided chains first, then those without guidance."""
    mine = probes[(probes["training_reward"] == training_reward) & (probes["probe"] == NORMS)]
    seen = sorted({float(guidance) for guidance in mine["guidance"]})
    return [guidance for guidance in seen if guidance != 1.0] + [guidance for guidance in seen if guidance == 1.0]


def picture_keys() -> list[str]:
    """Columns that say which norm of which picture a row holds, within an arm and point."""
    return [*KEYS[3:], "prompt_id", "noise_id"]


def guidance_text(guidance: float) -> str:
    """``guidance 2``, or ``without guidance``."""
    return "without guidance" if guidance == 1.0 else f"guidance {guidance:g}"


def distinct(rows: pd.DataFrame, arms: Sequence[str], identity: list[str]) -> list[tuple[str, str]]:
    """(name, arm) of what differs between arms: `all arms` once where their values are the same, as at the start."""
    present = [arm for arm in arms if (rows["arm"] == arm).any()]
    tables = [rows[rows["arm"] == arm].groupby(identity)["value"].mean() for arm in present]
    same = len(tables) > 1 and all(
        table.index.equals(tables[0].index) and np.allclose(table, tables[0], rtol=1e-6, atol=0, equal_nan=True)
        for table in tables[1:]
    )
    return [("all arms", present[0])] if same else [(f"**{f.markdown(arm)}**", arm) for arm in present]


# ------------------------------------------------------------------ figure of norms


def norms_figure(probes: pd.DataFrame, arms: Sequence[str], training_reward: str, name: str) -> Drawn | None:
    """Norms against the sampling step at start, middle and end of training; None where nothing was measured.

    Args:
        probes: Rows of `probes.parquet` of all cells.
        arms: Of the run, in its order: colours are those of the other figures.
        training_reward: One figure each.
        name: File name without suffix.
    """
    points, guidances = points_of(probes, training_reward, NORMS), guidances_of(probes, training_reward)
    if not points:
        return None
    data = norm_rows(probes[probes["training_reward"] == training_reward], arms)
    lines = [(quantity, guidance) for quantity in DRAWN for guidance in guidances]
    figure = Figure(figsize=(10.4, 0.8 + 1.85 * len(lines)), layout=roomy())
    grid = figure.subplots(len(lines), len(points), squeeze=False, sharex=True, sharey="row")
    look = looks(arms)
    for row, (quantity, guidance) in zip(grid, lines, strict=True):
        mine = data[(data["quantity"] == quantity) & (data["guidance"] == guidance)]
        for axes, point in zip(row, points, strict=True):
            _panel(axes, mine[mine["point"] == point], look)
        # Bands of few seeds are wide: the lines set the scale, one for all guidances.
        _scale(row[0], data.loc[data["quantity"] == quantity, "mean"])
        row[0].set_ylabel(f"{DRAWN[quantity]}\n{guidance_text(guidance)}")
    for axes, point in zip(grid[0], points, strict=True):
        axes.set_title(f"{point} of training")
    for axes in grid[-1]:
        axes.set_xlabel("sampling step (0: most noise)")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    found = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    shown = [arm for arm in arms if arm in found]
    figure.legend([found[arm] for arm in shown], shown, loc="outside upper center", ncols=min(len(shown), 7))
    title = f"Norm of the gradient of {training_reward} along the chain"
    return Drawn(name, title, figure, data, _caption(probes, data, arms, training_reward), _alt(data, arms))


def norm_rows(probes: pd.DataFrame, arms: Sequence[str]) -> pd.DataFrame:
    """One row per seed and step with its median, and the geometric mean over seeds with its interval beside it."""
    rows = profiles(probes, *DRAWN)
    rows["log"] = logarithms(rows["median"])
    place = [key for key in KEYS if key != "seed"]
    means = {}
    for key, mine in rows.groupby(place):
        interval = exponential(seed_t(mine["log"].to_numpy()))
        means[key] = (interval.estimate, interval.low, interval.high, interval.n)
    summary = pd.DataFrame.from_dict(means, orient="index", columns=["mean", "low", "high", "n"])
    summary.index = pd.MultiIndex.from_tuples(summary.index, names=place)
    rows = rows.drop(columns=["log", "p95"]).join(summary, on=place)
    rank = {value: index for index, value in enumerate((*arms, *POINTS, *DRAWN))}
    return rows.sort_values(KEYS, key=lambda column: column.map(lambda value: rank.get(value, value)), kind="stable")


def _panel(axes: Axes, rows: pd.DataFrame, look: dict[str, Look]) -> None:
    axes.grid(axis="both", which="major")
    axes.set_yscale("log")
    shade = 0.15 if rows["arm"].nunique() <= 3 else 0.08
    for arm, mine in rows.groupby("arm", sort=False):
        line = mine.drop_duplicates("step").sort_values("step")
        drawn, steps = look[str(arm)], line["step"]
        axes.fill_between(steps, line["low"], line["high"], color=drawn.colour, alpha=shade, linewidth=0)
        axes.plot(
            steps, line["mean"], drawn.line, color=drawn.colour, marker=drawn.marker, markersize=4,
            markeredgecolor="white", markeredgewidth=0.5, linewidth=1.5, markevery=max(1, len(steps) // 10),
            label=str(arm), zorder=3,
        )  # fmt: skip


def _scale(axes: Axes, heights: pd.Series) -> None:
    shown = heights[np.isfinite(heights) & (heights > 0)]
    if shown.empty:
        return
    reach = float(shown.max() / shown.min())
    room = max(reach**0.12, 1.1)
    axes.set_ylim(shown.min() / room, shown.max() * room)
    subs = (1.0,) if reach > 100 else (1.0, 2.0, 5.0) if reach > 8 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs) if reach > 2.5 else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _caption(probes: pd.DataFrame, data: pd.DataFrame, arms: Sequence[str], training_reward: str) -> str:
    seeds, pictures = int(data["n"].max()), int(data["pictures"].max())
    text = (
        f"Norm of the gradient of one picture's reward ({training_reward}) by the adapter as it acts in one sampling "
        "step alone, and by the latent that enters the step, through the whole chain. A backward pass runs from right "
        f"to left: exploding gradients rise to the left. Lines: median over {f.plural(pictures, 'picture')}, geometric "
        f"mean over {f.plural(seeds, 'training seed')}; bands: pointwise 95 % t interval over seeds, on the logarithm, "
        "cut off where they leave the range of the lines."
    )
    start = at(probes, training_reward, POINTS[0])
    same = distinct(start[start["probe"] == NORMS], arms, picture_keys())
    if same[:1] and same[0][0] == "all arms":
        text += " At the start all arms have the same weights, and their lines coincide."
    return f"{text} {finite_text(data)}"


def finite_text(rows: pd.DataFrame) -> str:
    """Whether all norms were finite; else where they were not."""
    parts = []
    # Guidance 1 is none, and comes last.
    order = rows.assign(unguided=rows["guidance"] == 1.0).sort_values("unguided", kind="stable")
    for (arm, point, guidance), mine in order.groupby(["arm", "point", "guidance"], sort=False):
        if (lost := 1 - mine["finite"].sum() / mine["pictures"].sum()) > 0:
            where = f"{arm} at the {point}, {guidance_text(float(str(guidance)))}"
            parts.append(f"{f.significant(100 * lost, 2)} % of {where}")
    return f"Not finite, and left out of the medians: {f.joined(parts)}." if parts else "All gradients were finite."


def _alt(data: pd.DataFrame, arms: Sequence[str]) -> str:
    last = [point for point in POINTS if (data["point"] == point).any()][-1]
    parts = []
    for guidance in guidances_of(data.assign(probe=NORMS), str(data["training_reward"].iloc[0])):
        mine = data[(data["point"] == last) & (data["guidance"] == guidance) & (data["quantity"] == "norm-latents")]
        for arm in arms:
            line = mine[mine["arm"] == arm].drop_duplicates("step").sort_values("step")["mean"]
            if len(line):
                ends = f"{short(float(line.iloc[-1]))} at the last step, {short(float(line.iloc[0]))} at the first"
                parts.append(f"{arm} {guidance_text(guidance)}: {ends}")
    return f"Gradient norms by sampling step; by the latents, at the {last} of training: {'; '.join(parts)}."


# ------------------------------------------------------------------ numbers as text


def exponential(interval: Interval) -> Interval:
    """An interval of a logarithm as one of the quantity."""
    with np.errstate(over="ignore"):
        estimate, low, high = np.exp([interval.estimate, interval.low, interval.high]).tolist()
    return Interval(estimate, low, high, interval.level, interval.n, note=interval.note)


def short(value: float) -> str:
    """Three significant digits, with a power of ten where the number is far from one."""
    if np.isfinite(value) and value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("-", "−")
    return f.significant(value)
