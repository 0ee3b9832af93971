"""Best-of-N: generate N pictures of a prompt with the base model, keep the one that the reward likes best.

    Input: prompt c, initial latent x_T, reward r, N
    for j = 1..N:  z_1 = x_T, z_j ~ N(0, I) for j > 1
        x^j = sample(theta_base, c, z_j)
    return the x^j with the largest r(x^j, c), the first of equals

Cost of a picture: N chains forward, N decodes, N queries; nothing is trained.
Differs from the DRaFT paper's best-of-16 baseline in: nothing that the paper states. For a Gaussian reward the
expected gain is the order statistic E[max of N] (1.77 standard deviations at N = 16).
"""

from __future__ import annotations

from pydantic import Field

from harness.api import InferenceConfig, Request
from methods._candidates import candidate
from methods._selection import SelectionTuner


class BestOfNConfig(InferenceConfig):
    """Best-of-N's settings."""

    n: int = Field(16, ge=1, description="Candidates for each picture, N. DRaFT's baseline: 16.")


class BestOfN(SelectionTuner[BestOfNConfig]):
    """Best-of-N: the best of N pictures of the base model by the reward."""

    version = "1"
    stochastic = True
    needs_reward_gradient = False
    Config = BestOfNConfig

    @property
    def candidates(self) -> int:
        """N."""
        return self.config.n

    def candidate(self, request: Request, index: int) -> Request:
        """Another initial latent."""
        return candidate(request, index, self.model, self.context.randomness)
