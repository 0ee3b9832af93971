"""What flow-matching models share: a transformer that predicts noise - x0, and the timesteps of their scheduler."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from harness.api import SamplerConfig, UserError
from models._latent_diffusion import LatentDiffusion


class FlowMatching(LatentDiffusion):
    """x_t = (1 - s)*x0 + s*noise with s = t/1000; t is a real number, and the scheduler says which are visited.

    Attributes:
        patch_size: Side of the square of latents that is one token of the transformer.
    """

    patch_size: int

    def __init__(
        self, source: str, device: torch.device, dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> None:
        super().__init__(source, device, dtype, revision)
        self.prediction_type = "flow"
        if self.scheduler.config.invert_sigmas:
            raise UserError(f"{self.name}: a scheduler with invert_sigmas is not supported")

    @abstractmethod
    def own_sigmas(self, steps: int) -> list[float] | None:
        """Noise levels before shifting that the family's pipeline gives its scheduler; None: the scheduler's own."""

    def timesteps(self, config: SamplerConfig) -> Sequence[float]:
        """Those of `FlowMatchEulerDiscreteScheduler` with the settings stored beside the model.

        The shift of dynamic shifting is linear in the number of tokens.

        Raises:
            UserError: The sampler asks for a convention of models with discrete timesteps.
        """
        if config.spacing != "trailing" or config.final_alpha != "one":
            raise UserError(
                f"sampler.spacing={config.spacing} and sampler.final_alpha={config.final_alpha}: {self.name} is a flow "
                "model, whose timesteps are those of its own scheduler and end at the clean latent; leave both as they "
                "are by default (trailing, one)"
            )
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        settings = scheduler.config
        tokens = (self.latent_shape[1] // self.patch_size) * (self.latent_shape[2] // self.patch_size)
        slope = (settings.max_shift - settings.base_shift) / (settings.max_image_seq_len - settings.base_image_seq_len)
        shift: Mapping[str, Any] = {}
        if settings.use_dynamic_shifting:
            shift = {"mu": settings.base_shift + slope * (tokens - settings.base_image_seq_len)}
        scheduler.set_timesteps(config.steps, sigmas=self.own_sigmas(config.steps), **shift)
        visited: list[float] = scheduler.timesteps.double().tolist()
        return visited

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """The straight line from the clean latent to noise."""
        sigma = t / self.training_timesteps
        return 1 - sigma, sigma

    def identity(self) -> tuple[object, ...]:
        """The scheduler's settings, and scale and shift of latents."""
        settings = {k: v for k, v in self.scheduler.config.items() if not k.startswith("_")}
        return self.prediction_type, sorted(settings.items()), self.vae.config.scaling_factor, self._shift
