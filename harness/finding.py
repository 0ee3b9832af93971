"""A claim of the literature and the statements that it is judged by, as a preset declares them (no torch here).

A statement is a contrast of quantities, one value per training seed, and the sign that the claim expects of it. The
report estimates it with an interval over seeds and says whether the claim is confirmed, not confirmed, or cannot be
decided at this size. Everything is written down before a cell runs.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Axis = Literal["queries", "denoiser_rows", "train_seconds"]


class Quantity(BaseModel):
    """One number per training seed.

    `gain`: score minus the base model's, in base SD. `diversity`: Vendi score over the base model's.
    `gradient-norm`: natural logarithm of the median over pictures of a per-step gradient norm. `gradient-growth`: mean
    change of that logarithm per step towards the noise. `gradient-variance`: natural logarithm of the variance of an
    arm's gradient at equal denoiser rows (or queries: `axis`), over its squared mean. `update-seconds`: natural
    logarithm of the mean seconds of an iteration in the run. `seconds` and `memory`: the same of an iteration and of
    the peak MiB of the arm alone, one value per repetition of the timing pass instead of per seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    of: Literal[
        "gain",
        "diversity",
        "gradient-norm",
        "gradient-growth",
        "gradient-variance",
        "update-seconds",
        "seconds",
        "memory",
    ] = "gain"
    arm: str
    trained_on: str | None = Field(None, description="Training reward; None: the run's first.")
    reward: str | None = Field(None, description="What is scored; None: what was trained on.")
    split: Literal["training", "held-out"] = "held-out"
    variant: str = Field("default", description="Variant of the trained adapter, or a mixture's label.")
    axis: Axis | None = Field(
        None, description="Compare where the arms of the statement have spent equally much of this; None: at the end."
    )
    point: str | None = Field(None, description="Of training: a curve point, or start, middle, end of a probe.")
    guidance: float | None = Field(None, description="Of a probe; None: the run's.")
    norm: Literal["latents", "adapter"] = Field("adapter", description="Gradient by the latents or by the adapter.")
    step: int | None = Field(
        None, description="Sampling step of a gradient norm, -1 is the last; None: all steps together."
    )
    times: float = Field(1.0, description="Factor on it.")
    at: str | None = Field(None, description="Arm whose weights a gradient variance is measured at; None: the arm.")


class Statement(BaseModel):
    """`text` holds if the sum of `plus` minus the sum of `minus` is above zero."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    plus: tuple[Quantity, ...] = ()
    minus: tuple[Quantity, ...] = ()
    beyond: float = Field(0.0, description="The contrast has to exceed this instead of zero.")
    unit: str = Field("base SD", description="Of the contrast, for the table.")


class Finding(BaseModel):
    """What is claimed, by whom, and how it is judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    claim: str
    source: str
    statements: tuple[Statement, ...]
    paired: bool = Field(
        False, description="Arms share what is random about a seed, so that differences are taken within seeds."
    )
