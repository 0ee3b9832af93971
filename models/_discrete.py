"""What latent diffusion models with discrete timesteps share: a UNet, and noise levels by alphas_cumprod."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.api import Adapter, Conditioning, SamplerConfig, UserError
from harness.sampling import timesteps
from models._latent_diffusion import LatentDiffusion


class DiscreteDiffusion(LatentDiffusion):
    """A UNet that predicts noise, velocity or the clean latent. Subclasses say what it is told about prompts."""

    def __init__(
        self, source: str, device: torch.device, dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> None:
        super().__init__(source, device, dtype, revision)
        config = self.denoiser.config
        if config.time_cond_proj_dim is not None:
            raise UserError(
                f"{self.name} was distilled to be told its guidance scale (time_cond_proj_dim), as latent consistency "
                "models are: that is not supported for UNets; take the model that it was distilled from"
            )
        self.prediction_type = self.scheduler.config.prediction_type
        self._alphas_cumprod: list[float] = self.scheduler.alphas_cumprod.double().tolist()
        side = int(config.sample_size)
        self.latent_shape = (int(config.in_channels), side, side)

    def timesteps(self, config: SamplerConfig) -> Sequence[float]:
        """By the spacing that the sampler asks for."""
        return timesteps(self.training_timesteps, config)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """Square roots of alphas_cumprod and of its complement."""
        cumulative = self._alphas_cumprod[int(t)]
        return cumulative**0.5, (1 - cumulative) ** 0.5

    def denoise(self, x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        """One pass through the UNet."""
        return self.network(adapter, sample=x_BCHW, timestep=int(t), **self.told(condition))

    @abstractmethod
    def told(self, condition: Conditioning) -> dict[str, Any]:
        """What the UNet is given beside latents and timestep, by its own keywords."""
