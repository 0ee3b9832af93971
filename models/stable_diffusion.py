"""Stable Diffusion 1.x and 2.x, and everything else stored as a diffusers `StableDiffusionPipeline`.

The embedded emoji model takes exactly this path.
"""

from __future__ import annotations

from typing import Any, final

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from harness.api import Conditioning
from models._discrete import DiscreteDiffusion
from models._parts import Layout, token_ids

PIPELINES = ("StableDiffusionPipeline",)


def load(source: str, device: torch.device, dtype: torch.dtype, revision: str | None) -> StableDiffusion:
    """The model stored in a directory or known by a hub id."""
    return StableDiffusion(source, device, dtype, revision)


@final
class StableDiffusion(DiscreteDiffusion):
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

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Last hidden states of the text encoder, (B, L, D); over-long prompts are cut to the tokenizer's length."""
        tokenizer = self.tokenizers["tokenizer"]
        ids = token_ids(tokenizer, texts, tokenizer.model_max_length, self.device)
        return {"encoder_hidden_states": self.text_encoders["text_encoder"](ids)[0]}

    def told(self, condition: Conditioning) -> dict[str, Any]:
        """The hidden states alone."""
        return dict(condition.tensors)

    def identity(self) -> tuple[object, ...]:
        """Parametrisation, noise levels and the scale of latents."""
        return self.prediction_type, self._alphas_cumprod, self.vae.config.scaling_factor
