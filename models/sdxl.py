"""Stable Diffusion XL, and everything else stored as a diffusers `StableDiffusionXLPipeline`."""

from __future__ import annotations

from typing import Any, final

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from harness.api import Conditioning
from models._discrete import DiscreteDiffusion
from models._parts import Layout, token_ids

PIPELINES = ("StableDiffusionXLPipeline",)


def load(source: str, device: torch.device, dtype: torch.dtype, revision: str | None) -> StableDiffusionXL:
    """The model stored in a directory or known by a hub id."""
    return StableDiffusionXL(source, device, dtype, revision)


@final
class StableDiffusionXL(DiscreteDiffusion):
    """A UNet that is told hidden states of two CLIP text encoders, a pooled embedding, and the size of pictures.

    Pictures are of the UNet's own size, not cropped. The unconditional row is zero where the pipeline's
    `force_zeros_for_empty_prompt` says so (its default, and the published model's), else the encoded empty text.
    Arguments and errors are those of `LatentDiffusion`.
    """

    layout = Layout(
        pipeline=StableDiffusionXLPipeline,
        denoiser=("unet", UNet2DConditionModel),
        text_encoders={"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection},
        tokenizers={"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer},
        scheduler=DDPMScheduler,
    )

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """The last hidden states but one of both encoders (B, L, D1 + D2), and the second one's projection (B, D)."""
        hidden, pooled = [], torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers.values(), self.text_encoders.values(), strict=True):
            ids = token_ids(tokenizer, texts, tokenizer.model_max_length, self.device)
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output[0]  # of the second encoder in the end
        told = {"encoder_hidden_states": torch.cat(hidden, -1), "text_embeds": pooled}
        if self._zeros_for_empty:
            kept = torch.tensor([text != "" for text in texts], device=self.device)
            told = {name: rows * kept.view(-1, *[1] * (rows.ndim - 1)) for name, rows in told.items()}
        return told

    def told(self, condition: Conditioning) -> dict[str, Any]:
        """Hidden states, and as added conditions the pooled embedding and (height, width, 0, 0, height, width)."""
        pooled = condition.tensors["text_embeds"]
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        size = [scale * side for side in self.latent_shape[1:]]
        ids = torch.tensor([*size, 0, 0, *size], device=pooled.device, dtype=pooled.dtype)
        added = {"text_embeds": pooled, "time_ids": ids.expand(len(pooled), -1)}
        return {"encoder_hidden_states": condition.tensors["encoder_hidden_states"], "added_cond_kwargs": added}

    def identity(self) -> tuple[object, ...]:
        """Parametrisation, noise levels, the scale of latents, and what the empty prompt is."""
        scale = self.vae.config.scaling_factor
        return self.prediction_type, self._alphas_cumprod, scale, self._zeros_for_empty

    @property
    def _zeros_for_empty(self) -> bool:
        return bool(self.settings.get("force_zeros_for_empty_prompt", True))
