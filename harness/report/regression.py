"""T9: the run against a baseline, as `compare` recorded it last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from harness.report import formatting as f
from harness.report.account import data_until
from harness.report.records import BASE, Run
from harness.report.tables import Table
from harness.stats.intervals import Interval

COLUMNS = (
    *("family", "arm", "training_reward", "reward", "baseline", "new", "difference", "low", "high"),
    *("p_worse", "adjusted_p", "seeds", "how", "outcome", "needed", "note"),
)


def regression(run: Run) -> Table | None:
    """Every row that decides, then those that are only watched; None where the run was never compared."""
    compared = run.comparison
    if not compared:
        return None
    headers = ("method", "trained on", "judged by", "baseline", "this run", "difference", "outcome", "how")
    rows, data = [], []
    for row in compared["rows"]:
        bounds = row["difference"]
        name = "base model" if row["arm"] == BASE else row["arm"]
        watched = " (decides nothing)" if row["family"] == "watched" else ""
        how = f"{row['how']}; {row['note']}" if row["note"] else row["how"]
        rows.append(
            (
                f"**{f.markdown(name)}**",
                f.markdown(row["training_reward"] or f.DASH),
                f.markdown(row["reward"]),
                *(f.significant(_number(row[key]), sign=True) for key in ("baseline", "new")),
                f.estimate(_interval(bounds, row["seeds"])),
                f"{row['outcome']}{watched}",
                f.markdown(how),
            )
        )
        known = {**row, "difference": bounds["estimate"], "low": bounds["low"], "high": bounds["high"]}
        data.append({column: known[column] for column in COLUMNS})
    return Table(
        "table-regression", headers, tuple(rows), pd.DataFrame(data, columns=list(COLUMNS)), _note(run, compared)
    )


def _note(run: Run, compared: Mapping[str, Any]) -> str:
    baseline, new = compared["baseline"], compared["new"]
    missing = compared["missing"]
    against = (
        f"Against {f.markdown(baseline['name'])} (run {f.markdown(baseline['run'])}, data until "
        f"{f.markdown(baseline['until'])}, commit {f.markdown(baseline['git'].get('commit'))}): "
        f"**{compared['outcome']}** at a margin of {compared['margin']:g} base SD of the baseline."
    )
    how = (
        "Differences in base SD with 90 % intervals; WORSE only where Holm's p over the rows of a family is below "
        f"{compared['alpha']:g}."
    )
    parts = [against, how]
    if missing:
        shown = "; ".join(missing[:5]) + ("; ..." if len(missing) > 5 else "")
        parts.append(f"Not compared: {f.markdown(shown)}.")
    if new["until"] != data_until(run):
        parts.append("The run has gone on since: compare it again.")
    return " ".join(parts)


def _interval(bounds: Mapping[str, Any], seeds: int) -> Interval:
    estimate, low, high = (_number(bounds[key]) for key in ("estimate", "low", "high"))
    if low == high:  # known, not estimated
        low = high = math.nan
    return Interval(estimate, low, high, bounds["level"], seeds)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
