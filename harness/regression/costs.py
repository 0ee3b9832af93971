"""What runs cost, as ratios: flagged only if they differ beyond their noise and by a factor (the rule of asv)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.regression.snapshot import Snapshot, Trained
from harness.stats.comparisons import paired, welch
from harness.stats.intervals import NAN
from harness.stats.seed_means import Array

FACTOR = 1.1
ALPHA = 0.05
HARDWARE = ("platform", "cpu", "accelerator", "threads_per_worker")
# (cost of a cell, whether it is a count); a count depends on no clock and no hardware.
OF_CELLS = (
    ("queries", True),
    ("denoiser_rows", True),
    ("queries_per_picture", True),
    ("denoiser_rows_per_picture", True),
    ("train_seconds", False),
)
MEMORY = "peak_memory_mib"
OF_TIMING = ("seconds_per_iteration", "seconds_per_query", "seconds_per_picture", MEMORY)


@dataclass(frozen=True)
class CostRow:
    """One cost of one arm.

    Attributes:
        new, baseline: Geometric means over cells, or over repetitions of the timing pass.
        ratio, low, high: New over baseline with its 95 % interval; NaN where there is none.
        repetitions: The smaller number behind it.
        flagged: More by `FACTOR`, and different beyond noise.
        note: Why nothing could be flagged.
    """

    arm: str
    cost: str
    new: float
    baseline: float
    ratio: float
    low: float
    high: float
    repetitions: int
    flagged: bool
    note: str = ""


def cost_rows(new: Snapshot, baseline: Snapshot) -> list[CostRow]:
    """Costs of every arm that both have, those of cells first."""
    elsewhere = any(new.platform.get(key) != baseline.platform.get(key) for key in HARDWARE)
    labels = {arm["label"] for arm in new.arms}
    arms = [str(arm["label"]) for arm in baseline.arms if arm["label"] in labels]
    rows: list[CostRow | None] = []
    for arm in arms:
        for name, counted in OF_CELLS:
            rows.append(_of_cells(new, baseline, arm, name, counted, elsewhere))
        for name in OF_TIMING:
            ours, theirs = (_repeated(side.timing.get(arm, {}), name) for side in (new, baseline))
            if len(ours) and len(theirs):
                rows.append(_row(arm, f"{name}, alone", [ours], [theirs], False, elsewhere))
        if not (new.timing.get(arm) and baseline.timing.get(arm)):
            row = _of_cells(new, baseline, arm, MEMORY, False, elsewhere)
            rows.append(row and replace(row, flagged=False, note="of workers that ran other cells before: not judged"))
    return [row for row in rows if row is not None]


def _of_cells(new: Snapshot, baseline: Snapshot, arm: str, name: str, counted: bool, elsewhere: bool) -> CostRow | None:
    """Over the seeds that both have, one stratum for each training reward; None where there is nothing to compare."""
    ours: list[Array] = []
    theirs: list[Array] = []
    for reward in baseline.training_rewards:
        mine, yours = new.find(arm, reward), baseline.find(arm, reward)
        # A count that one side lacks is left out of both: the others stay paired.
        common = [s for s in sorted(mine.keys() & yours.keys()) if counted and _counts(mine[s], yours[s], name)]
        for cells, side in ((mine, ours), (yours, theirs)):
            side.append(_logs([cells[seed].costs.get(name, NAN) for seed in common or sorted(cells)]))
    if not all(len(values) for values in (*ours, *theirs)):
        return None
    return _row(arm, name, ours, theirs, counted, elsewhere)


def _counts(mine: Trained, yours: Trained, name: str) -> bool:
    return all(cell.costs.get(name, NAN) > 0 for cell in (mine, yours))


def _logs(values: list[float]) -> Array:
    kept = [value for value in values if math.isfinite(value) and value > 0]
    return np.log(np.array(kept, dtype=np.float64))


def _repeated(measured: Mapping[str, Any], name: str) -> Array:
    """Each process's number; of older records, which have no repetitions, the one there is."""
    return _logs([float(once[name]) for once in measured.get("repetitions", [measured]) if name in once])


def _row(arm: str, name: str, ours: list[Array], theirs: list[Array], counted: bool, elsewhere: bool) -> CostRow:
    same = counted and all(len(x) == len(y) for x, y in zip(ours, theirs, strict=True))
    interval = (paired(ours, theirs) if same else welch(ours, theirs)).interval
    ratio = math.exp(interval.estimate)
    # Counts that differ by one factor in all cells have no noise to be within.
    exact = counted and not math.isfinite(interval.low)
    different = exact or interval.p_value() < ALPHA
    note = ""
    if elsewhere and not counted:
        note = "other hardware: not judged"
    elif not exact and not math.isfinite(interval.low):
        note = "measured once: not judged" if interval.n < 2 else interval.note
    means = [math.exp(float(np.mean([values.mean() for values in side]))) for side in (ours, theirs)]
    low, high = (ratio, ratio) if exact else (math.exp(interval.low), math.exp(interval.high))
    flagged = ratio > FACTOR and different and not note
    return CostRow(arm, name, means[0], means[1], ratio, low, high, interval.n, flagged, note)
