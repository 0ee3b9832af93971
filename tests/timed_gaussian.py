"""A Gaussian model whose adapter is free at every timestep, and the exact moments of an affine chain.

With one bias and one gain per visited timestep the adapter can reach every Gaussian that a chain of affine steps can:
what is optimal in theory is then also reachable, and a method can be held to it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.api import (
    BASE,
    Adapter,
    AdapterConfig,
    AdapterFile,
    Conditioning,
    DenoiserConfig,
    DiffusionModel,
    Randomness,
    SamplerConfig,
)
from harness.sampling import schedule, transition
from models.gaussian import GaussianModel


class TimedGaussian(DiffusionModel):
    """`GaussianModel`, or another without an adapter, with a bias and a gain at each timestep as the adapter."""

    def __init__(self, sampler: SamplerConfig, base: DiffusionModel | None = None) -> None:
        self._base = base or GaussianModel()
        self.name, self.latent_shape = "timed gaussian", self._base.latent_shape
        self.prediction_type, self.training_timesteps = self._base.prediction_type, self._base.training_timesteps
        self.device, self.dtype = self._base.device, self._base.dtype
        self._rows = {step.t: row for row, step in enumerate(schedule(self._base, sampler))}
        self._adapter: dict[str, nn.Parameter] = {}

    def configure(self, config: DenoiserConfig) -> None:
        """As the Gaussian model."""
        self._base.configure(config)

    def timesteps(self, config: SamplerConfig) -> Sequence[float]:
        """As the Gaussian model."""
        return self._base.timesteps(config)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """As the Gaussian model."""
        return self._base.alpha_sigma(t)

    def condition(self, texts: Sequence[str]) -> Conditioning:
        """As the Gaussian model."""
        return self._base.condition(texts)

    def denoise(self, x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        """What the base says, plus this timestep's affine term."""
        noise = self._base.denoise(x_BCHW, t, condition, BASE)
        if not self._adapter:
            return noise
        values = self._adapter if adapter.parameters is None else adapter.parameters
        row = self._rows[t]
        return noise + adapter.scale * (values["bias"][row] + values["gain"][row] * x_BCHW)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """The identity."""
        return latents_BCHW

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The identity."""
        return images_BCHW

    def add_adapter(self, config: AdapterConfig, randomness: Randomness) -> None:
        """Zeros: the output does not change."""
        shape = (len(self._rows), *self.latent_shape)
        self._adapter = {name: nn.Parameter(torch.zeros(shape, dtype=self.dtype)) for name in ("bias", "gain")}

    def load_adapter(self, path: Path) -> AdapterFile:
        """Not needed by tests."""
        raise NotImplementedError

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """`bias` and `gain`, each (T, 3, 1, 1)."""
        return self._adapter

    def parameter_count(self) -> int:
        """As the Gaussian model."""
        return self._base.parameter_count()

    def save_adapter(self, directory: Path) -> None:
        """Not needed by tests."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """As the Gaussian model."""
        return self._base.fingerprint()


@dataclass(frozen=True)
class Moments:
    """Of the final latent, each (C,).

    Attributes:
        mean: Expectation.
        variance: Variance in all.
        injected: The part of the variance that the steps' noise gives; the rest comes from x_T.
    """

    mean: Tensor
    variance: Tensor
    injected: Tensor


@torch.no_grad()
def moments(model: DiffusionModel, sampler: SamplerConfig, adapter: Adapter) -> Moments:
    """Exact moments of a chain that starts at N(0, 1), for a model whose every step is affine in x_t."""
    condition = model.condition([""])
    mean = torch.zeros(model.latent_shape, dtype=model.dtype)
    variance, injected = torch.ones_like(mean), torch.zeros_like(mean)
    for step in schedule(model, sampler):
        at_zero, at_one = (
            transition(model.predict(x[None], step.t, condition, guidance=1.0, adapter=adapter), step).mean[0]
            for x in (torch.zeros_like(mean), torch.ones_like(mean))
        )
        slope = at_one - at_zero
        mean = at_zero + slope * mean
        variance, injected = (slope**2 * part + step.std**2 for part in (variance, injected))
    return Moments(mean.flatten(), variance.flatten(), injected.flatten())
