"""Stable Diffusion 1.x and 2.x, and everything else stored as a diffusers `StableDiffusionPipeline`.

The embedded emoji model takes exactly this path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from harness.api import Adapter, Conditioning
from models._latent_diffusion import LatentDiffusion, Layout, token_ids

PIPELINES = ("StableDiffusionPipeline",)


def load(source: str, device: torch.device, dtype: torch.dtype, revision: str | None) -> StableDiffusion:
    """The model stored in a directory or known by a hub id."""
    return StableDiffusion(source, device, dtype, revision)


@final
class StableDiffusion(LatentDiffusion):
    """A UNet that is told the hidden states of a CLIP text encoder; epsilon, v or sample prediction.

    Arguments and errors are those of `LatentDiffusion`.
    """

    layout = Layout(
        pipeline=StableDiffusionPipeline,
        denoiser=("unet", UNet2DConditionModel),
        text_encoders={"text_encoder": CLIPTextModel},
        tokenizers={"tokenizer": CLIPTokenizer},
        scheduler=DDPMScheduler,
    )

    def __init__(
        self, source: str, device: torch.device, dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> None:
        super().__init__(source, device, dtype, revision)
        self.prediction_type = self.scheduler.config.prediction_type
        self._alphas_cumprod: list[float] = self.scheduler.alphas_cumprod.double().tolist()
        side = int(self.denoiser.config.sample_size)
        self.latent_shape = (int(self.denoiser.config.in_channels), side, side)

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """Square roots of alphas_cumprod and of its complement."""
        cumulative = self._alphas_cumprod[t]
        return cumulative**0.5, (1 - cumulative) ** 0.5

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Last hidden states of the text encoder, (B, L, D); over-long prompts are cut to the tokenizer's length."""
        tokenizer = self.tokenizers["tokenizer"]
        ids = token_ids(tokenizer, texts, tokenizer.model_max_length, self.device)
        return {"encoder_hidden_states": self.text_encoders["text_encoder"](ids)[0]}

    def denoise(self, x_BCHW: Tensor, t: int, condition: Conditioning, adapter: Adapter) -> Tensor:
        """One pass through the UNet."""
        return self.network(adapter, sample=x_BCHW, timestep=t, **condition.tensors)

    def identity(self) -> tuple[object, ...]:
        """Parametrisation, noise levels and the scale of latents."""
        return self.prediction_type, self._alphas_cumprod, self.vae.config.scaling_factor
