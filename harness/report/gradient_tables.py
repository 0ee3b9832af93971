"""Tables of the gradient probes: norms of truncated gradients, and the scatter of estimators against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.report import formatting as f
from harness.report.gradients import (
    DRAWN,
    NAN,
    NORMS,
    TOTAL,
    VARIANCE,
    Norm,
    Unit,
    at,
    by_seed,
    distinct,
    exponential,
    finite_text,
    guidance_text,
    guidances_of,
    log_growth,
    log_relative_variance,
    logarithms,
    picture_keys,
    points_of,
    profiles,
    short,
)
from harness.report.tables import Table
from harness.stats.intervals import Interval, seed_t

TRUNCATIONS = (1, 2, 5, 10)
UNITS: dict[Unit, str] = {"requests": "batch", "rows": "denoiser rows", "queries": "queries"}
GROWTHS: dict[Norm, str] = {"latents": "growth", "adapter": "growth by adapter"}


@dataclass(frozen=True)
class Line:
    """One line of a table's data: what it is about, and intervals over seeds by name."""

    about: Mapping[str, object]
    found: Mapping[str, Interval]

    @property
    def record(self) -> dict[str, object]:
        """As a row of the CSV."""
        numbers: dict[str, object] = {}
        for name, interval in self.found.items():
            numbers |= {name: interval.estimate, f"{name} low": interval.low, f"{name} high": interval.high}
            numbers[f"{name} n"] = interval.n
        return {**self.about, **numbers}


def norms_table(probes: pd.DataFrame, arms: Sequence[str], training_reward: str, name: str) -> Table:
    """Norms of truncated gradients by K, and how fast the gradient by the latents grows towards the noise.

    Args:
        probes: Rows of `probes.parquet` of all cells.
        arms: Of the run, in its order.
        training_reward: One table each.
        name: File name of the CSV, without suffix.
    """
    mine = probes[(probes["training_reward"] == training_reward) & (probes["probe"] == NORMS)]
    guidances = guidances_of(probes, training_reward)
    chains = {int(step) + 1 for step in mine.groupby("arm")["step"].max()}
    truncations = [k for k in TRUNCATIONS if k < max(chains, default=0)]
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, object]] = []
    for point in points_of(probes, training_reward, NORMS):
        for label, arm in distinct(mine[mine["point"] == point], arms, picture_keys()):
            lines = [_norm_line(mine, arm, point, guidance, truncations) for guidance in guidances]
            common = {"training_reward": training_reward, "weights": label.strip("*"), "arm": arm, "point": point}
            data += [common | line.record for line in lines]
            cells = [_norm_text(lines[0], str(k)) for k in (*truncations, "T")]
            rows.append((f"{label}, {point}", *cells, *(_ratio_text(line.found["growth"]) for line in lines)))
    whole = f"K = T = {max(chains)}" if len(chains) == 1 else "K = T"
    growths = [f"growth per step, {guidance_text(guidance)}" for guidance in guidances]
    headers = ("weights", *(f"K = {k}" for k in truncations), whole, *growths)
    if not rows:
        return Table("", headers, (), pd.DataFrame())
    note = (
        f"Norm of the adapter's gradient of {f.markdown(training_reward)} through the last K steps "
        f"({guidance_text(guidances[0])}): median over pictures, in brackets the 95th percentile, geometric means "
        "over seeds. Growth: factor per step towards the noise of the gradient by the latents (slope of the logarithm "
        "of the median over all steps), with 95 % t interval over seeds; above 1 it grows, below 1 it shrinks. "
        f"{f.markdown(finite_text(profiles(mine, *DRAWN, TOTAL)))}"
    )
    return Table(name, headers, tuple(rows), pd.DataFrame(data), note)


def _norm_line(probes: pd.DataFrame, arm: str, point: str, guidance: float, truncations: Sequence[int]) -> Line:
    """What one arm's weights give at one point of training; `probes` are of one training reward."""
    (training_reward,) = probes["training_reward"].unique()
    here = at(probes, training_reward, point, arm, guidance)
    every = profiles(here, *DRAWN, TOTAL)
    totals = every[every["quantity"] == TOTAL]
    length = int(totals["step"].max()) + 1 if len(totals) else 0
    found: dict[str, Interval] = {}
    for label, k in [*((str(k), k) for k in truncations), ("T", length)]:
        step = totals[totals["step"] == length - k]
        found |= {f"K={label}": exponential(seed_t(logarithms(step["median"])))}
        found |= {f"K={label} p95": exponential(seed_t(logarithms(step["p95"])))}
    for norm, title in GROWTHS.items():
        slopes = log_growth(here, arm, training_reward=training_reward, point=point, guidance=guidance, norm=norm)
        found[title] = exponential(seed_t(list(slopes.values())))
    lost = 1 - every["finite"].sum() / every["pictures"].sum() if len(every) else NAN
    return Line({"guidance": guidance, "T": length, "not finite": float(lost)}, found)


def _norm_text(line: Line, k: str) -> str:
    middle, high = (short(line.found[f"K={k}{suffix}"].estimate) for suffix in ("", " p95"))
    return middle if middle == f.DASH else f"{middle} ({high})"


def variance_table(probes: pd.DataFrame, arms: Sequence[str], training_reward: str, name: str) -> Table:
    """Scatter of each estimator's gradient relative to its length, at the same weights, against the first estimator.

    Args:
        probes: Rows of `probes.parquet` of all cells.
        arms: Of the run, in its order; the first one that was measured is what others are compared with.
        training_reward: One table each.
        name: File name of the CSV, without suffix.
    """
    mine = probes[(probes["training_reward"] == training_reward) & (probes["probe"] == VARIANCE)]
    estimators = [arm for arm in arms if (mine["estimator"] == arm).any()]
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, object]] = []
    for point in points_of(probes, training_reward, VARIANCE):
        for label, arm in distinct(mine[mine["point"] == point], arms, ["seed", "estimator", "quantity"]):
            here = at(mine, training_reward, point, arm)
            common = {"training_reward": training_reward, "weights": label.strip("*"), "arm": arm, "point": point}
            for estimator in estimators:
                line = _variance_line(here, estimator, estimators[0])
                data.append(common | line.record)
                known = {title: _counted(line, title) for title in line.found}
                if estimator == estimators[0]:
                    known |= {title: "1" for title in known if title != "relative variance"}
                rows.append((f"{label}, {point}", f.markdown(estimator), *known.values()))
    reference = f.markdown(estimators[0]) if estimators else ""
    headers = (
        *("weights", "gradient of", "variance / squared mean"),
        *(f"at equal {unit}, × {reference}" for unit in UNITS.values()),
        f"cosine with {reference}",
    )
    if not rows:
        return Table("", headers, (), pd.DataFrame())
    note = (
        "Variance of the gradient of one iteration over the squared length of its expectation: geometric mean over "
        f"seeds; then its ratio to that of {reference} within seeds, if the variance falls as one over the batch: "
        "below 1 an estimator scatters less for the same cost. Cosine: of the expected gradients, with the noise of "
        "both accounted for (its estimate may exceed 1). 95 % t intervals over seeds."
    )
    if any("/" in cell for row in rows for cell in row[2:]):
        note += (
            " k/n: in the other seeds the squared length could not be told from zero; those would have had the largest "
            "ratios."
        )
    return Table(name, headers, tuple(rows), pd.DataFrame(data), note)


def _variance_line(probes: pd.DataFrame, estimator: str, reference: str) -> Line:
    """One estimator against the reference; `probes` are of one arm's weights at one point of training."""
    (training_reward,), (at_arm,), (point,) = (probes[c].unique() for c in ("training_reward", "arm", "point"))

    def logs(whose: str, per: Unit | None) -> dict[int, float]:
        return log_relative_variance(
            probes, whose, at_arm=at_arm, training_reward=training_reward, point=point, per=per
        )

    own = logs(estimator, None)
    found = {"relative variance": exponential(seed_t(list(own.values())))}
    for unit, title in UNITS.items():
        other = logs(reference, unit)
        ratios = [value - other.get(seed, NAN) for seed, value in logs(estimator, unit).items()]
        found[f"ratio at equal {title}"] = exponential(seed_t(ratios))
    columns = ["cosine", "squared-mean", "variance", *UNITS]
    values = by_seed(probes, estimator).reindex(columns=columns).astype("float64")
    found["cosine"] = seed_t(values["cosine"].to_numpy())
    means = {quantity: float(values[quantity].mean()) for quantity in columns[1:]}
    return Line({"estimator": estimator, "reference": reference, "seeds": len(own), **means}, found)


def _ratio_text(interval: Interval) -> str:
    """``1.05 [1.03, 1.07]``; bounds keep their digits, since intervals of ratios are not symmetric."""
    if not np.isfinite(interval.estimate):
        return f.DASH
    if not np.isfinite(interval.half_width):
        return f"{short(interval.estimate)} ({f'n={interval.n}' if interval.n < 2 else 'no interval'})"
    return f"{short(interval.estimate)} [{short(interval.low)}, {short(interval.high)}]"


def _plain_text(interval: Interval) -> str:
    return f.estimate(interval, sign=False)


def _counted(line: Line, title: str) -> str:
    """The interval, and how many of the seeds it rests on where some have no value."""
    text: Callable[[Interval], str] = _plain_text if title == "cosine" else _ratio_text
    known, planned = line.found[title].n, int(str(line.about["seeds"]))
    return text(line.found[title]) + (f" ({known}/{planned})" if known < planned else "")
