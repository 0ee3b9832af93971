"""How fast methods learn, one number a seed: the height of the curve, and queries until a level is reached."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from harness.report import formatting as f
from harness.report.analysis import Analysis
from harness.report.tables import Table, arm_name, bounds
from harness.stats.curves import log_auc, time_to_threshold
from harness.stats.effects import best_of_n_equivalent
from harness.stats.intervals import seed_t

LEVEL = 0.5


def speed(analysis: Analysis) -> Table:
    """One row per method and training reward with a curve."""
    headers = (
        *("method", "trained on", "mean height of the curve (base SD)", "final gain (base SD)"),
        *(f"queries until +{LEVEL:g} base SD", "reached by", "like the best of n"),
    )
    rows, data = [], []
    for reward in analysis.run.training_rewards:
        sd, base = analysis.gains.sd(reward), analysis.gains.base_scores(reward, "held-out")
        for arm in analysis.run.arms:
            curve = analysis.gains.curve(arm, reward, reward)
            if arm in analysis.run.untrained or curve.values.shape[1] < 2 or not curve.seeds or not sd > 0:
                continue
            spent = curve.spent["queries"]
            known = np.isfinite(spent).any(axis=0)
            if not known.all():
                continue
            grid = np.nanmean(spent, axis=0)
            area = seed_t(log_auc(grid, curve.values / sd))
            time = time_to_threshold(grid, curve.values / sd, LEVEL)
            final = analysis.final(arm, reward)
            n = best_of_n_equivalent(base, final.interval.estimate) if len(base.seeds) else math.nan
            rows.append(
                (
                    *(arm_name(analysis.run, arm), f.markdown(reward), f.estimate(area)),
                    *(f.estimate(seed_t(final.standardised)), f.estimate(time.interval, sign=False)),
                    *(f"{time.reached} of {time.n} seeds", _best_of(n, final.interval.estimate, base.values.shape[2:])),
                )
            )
            record: dict[str, object] = {"arm": arm, "training_reward": reward, "threshold": LEVEL}
            record |= bounds("height", area) | bounds("queries until", time.interval)
            data.append(record | {"reached": time.reached, "n": time.n, "best_of_n": n})
    note = (
        "Height of the curve: mean gain over the logarithm of the queries spent, on the pictures that all points "
        f"share. Queries until: mean over seeds of the first point of the curve with a gain of {LEVEL:g} base SD, a "
        "level that holds for all runs; seeds that never reach it count with the whole budget. Like the best of n: "
        "the smallest n for which keeping the best of n pictures of the base model gains as much. 95 % t intervals "
        "over seeds."
    )
    return Table("table-speed" if rows else "", headers, tuple(rows), pd.DataFrame(data), note)


def _best_of(n: float, gain: float, latents: tuple[int, ...]) -> str:
    """The n; or that it is beyond the pictures that there are."""
    if math.isnan(n):
        return f.DASH
    if gain <= 0:
        return "1"
    return f"more than {latents[0]}" if math.isinf(n) else f.count(n)
