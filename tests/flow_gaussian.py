"""The closed-form Gaussian as a flow model: data N(mean, std^2), x_t = (1 - s)*x0 + s*noise, an exact velocity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from harness.api import (
    Adapter,
    AdapterConfig,
    AdapterFile,
    Conditioning,
    DenoiserConfig,
    DiffusionModel,
    Randomness,
    SamplerConfig,
)


@final
class FlowGaussian(DiffusionModel):
    """E[noise - x0 | x_t], plus the adapter's `bias + gain*x`; timesteps with the static shift of 3.

    Args:
        embedded_guidance: The scale is told to the denoiser, which adds (scale - 1)/10 to its output.
    """

    def __init__(self, mean: float = 0.3, std: float = 0.5, embedded_guidance: bool = False) -> None:
        self.name, self.latent_shape = "flow gaussian", (3, 1, 1)
        self.mean, self.std = mean, std
        self.prediction_type, self.training_timesteps = "flow", 1000
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.embedded_guidance = embedded_guidance
        self._adapter: dict[str, nn.Parameter] = {}

    def configure(self, config: DenoiserConfig) -> None:
        """Not needed by tests."""
        raise NotImplementedError

    def timesteps(self, config: SamplerConfig) -> Sequence[float]:
        """Evenly spaced before the shift."""
        even = [1 - i / config.steps for i in range(config.steps)]
        return [1000 * 3 * s / (1 + 2 * s) for s in even]

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """A straight line."""
        return 1 - t / 1000, t / 1000

    def condition(self, texts: Sequence[str]) -> Conditioning:
        """One constant per row, which the unconditional row lacks."""
        rows = [[0.0 if text == "" else 0.1] for text in texts]
        return Conditioning({"shift": torch.tensor(rows, dtype=self.dtype)})

    def denoise(self, x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        """The velocity of probability flow."""
        alpha, sigma = self.alpha_sigma(t)
        surprise = (x_BCHW - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        velocity = sigma * surprise - (self.mean + alpha * self.std**2 * surprise)
        if self.embedded_guidance:
            velocity = velocity + (condition.tensors["guidance"].to(velocity)[:, None, None, None] - 1) / 10
        elif condition.tensors["shift"].any():
            velocity = velocity + sigma * condition.tensors["shift"][:, :, None, None]
        if not self._adapter:
            return velocity
        values = self._adapter if adapter.parameters is None else adapter.parameters
        return velocity + adapter.scale * (values["bias"] + values["gain"] * x_BCHW)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """The identity."""
        return latents_BCHW

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """The identity."""
        return images_BCHW

    def add_adapter(self, config: AdapterConfig, randomness: Randomness) -> None:
        """Zeros: the output does not change."""
        self._adapter = {
            name: nn.Parameter(torch.zeros(self.latent_shape, dtype=self.dtype)) for name in ("bias", "gain")
        }

    def load_adapter(self, path: Path) -> AdapterFile:
        """Not needed by tests."""
        raise NotImplementedError

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """`bias` and `gain`, each (3, 1, 1)."""
        return self._adapter

    def parameter_count(self) -> int:
        """None: the velocity is a formula."""
        return 0

    def save_adapter(self, directory: Path) -> None:
        """Not needed by tests."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Of nothing that tests change."""
        return "flow gaussian"
