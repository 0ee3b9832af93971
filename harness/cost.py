"""What is spent, in the units that budgets and cost tables use."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Cost:
    """What was, or will be, spent. Rows count guidance twice; rows of different kinds are counted apart.

    Attributes:
        forward_rows: Denoiser rows without gradient.
        gradient_rows: Denoiser rows whose graph was kept (or checkpointed) for a backward pass.
        recomputed_rows: Rows computed again by gradient checkpointing.
        backward_rows: Rows that a backward pass went through.
        decodes: Latents decoded to pictures.
        queries: Pictures scored, times component rewards.
        reward_gradients: Of these, how many gave a gradient.
    """

    forward_rows: float = 0
    gradient_rows: float = 0
    recomputed_rows: float = 0
    backward_rows: float = 0
    decodes: float = 0
    queries: float = 0
    reward_gradients: float = 0

    @property
    def denoiser_rows(self) -> float:
        """All passes of rows through the denoiser: forward, recomputed and backward."""
        return self.forward_rows + self.gradient_rows + self.recomputed_rows + self.backward_rows

    def counts(self) -> dict[str, float]:
        """By name, as records hold them, the sum of rows included."""
        return asdict(self) | {"denoiser_rows": self.denoiser_rows}

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass(frozen=True)
class CostRange:
    """Cost of one iteration: what to expect, and what it can at most be (they differ where a method draws lengths)."""

    expected: Cost
    maximal: Cost
