"""Floating-point operations of training: the meter's counts times what each unit takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.report.records import Cell, Run, weights

UNKNOWN = float("nan")


def training_flops(run: Run, cell: Cell, cost: Mapping[str, float]) -> float:
    """Of one cell's training, which spent `cost`; NaN where units or counts were not recorded.

    Every picture is scored by each component of the training reward. A gradient passes each component that has one
    and then the decoder, once a picture.
    """
    terms = weights(cell.reward) or {}
    units: Mapping[str, Any] = run.flops.get("rewards", {})
    if not terms or not set(terms) <= set(units):
        return UNKNOWN
    row, decode = run.flops["denoiser_row"], run.flops["decode"]
    differentiable = {info.name for info in run.rewards if info.differentiable} & set(terms)
    pictures = cost["queries"] / len(terms)
    with_gradient = cost["reward_gradients"] / len(differentiable) if differentiable else 0.0
    backward = cost["backward_rows"]
    share = float(run.timing.get(cell.arm, {}).get("rows_to_input_share", UNKNOWN)) if backward else 0.0
    total: float = (
        row["forward"] * (cost["forward_rows"] + cost["gradient_rows"] + cost["recomputed_rows"])
        + backward * (share * row["backward_to_input"] + (1 - share) * row["backward"])
        + decode["forward"] * cost["decodes"]
        + decode["backward"] * with_gradient
        + pictures * sum(units[name]["forward"] for name in terms)
        + with_gradient * sum(units[name]["backward"] for name in differentiable)
    )
    return total


def uncounted(run: Run) -> list[str]:
    """Training rewards none of whose operations is counted."""
    return [name for name, unit in run.flops.get("rewards", {}).items() if not unit["forward"]]
