"""FLUX.1, and everything else stored as a diffusers `FluxPipeline`."""

from __future__ import annotations

from typing import final

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from harness.api import Adapter, Conditioning, UserError
from models._flow import FlowMatching
from models._parts import Layout, token_ids

PIPELINES = ("FluxPipeline",)
T5_LENGTH = 512  # the pipeline's max_sequence_length


def load(source: str, device: torch.device, dtype: torch.dtype, revision: str | None) -> Flux:
    """The model stored in a directory or known by a hub id."""
    return Flux(source, device, dtype, revision)


@final
class Flux(FlowMatching):
    """A transformer over packed latents that is told a T5's hidden states and a CLIP's pooled embedding.

    Latents are (C, H, W) outside, with H and W even; the transformer sees one token for two by two of them. Pictures
    have the size that the autoencoder's config gives (1024). Where the transformer has `guidance_embeds` (FLUX.1
    dev), the guidance scale is an input of it; else (schnell) guidance is classifier-free, and 1 is what it was made
    for. Other arguments and errors are those of `LatentDiffusion`.
    """

    layout = Layout(
        pipeline=FluxPipeline,
        denoiser=("transformer", FluxTransformer2DModel),
        text_encoders={"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel},
        tokenizers={"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast},
        scheduler=FlowMatchEulerDiscreteScheduler,
    )

    def __init__(
        self, source: str, device: torch.device, dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> None:
        super().__init__(source, device, dtype, revision)
        self.embedded_guidance = bool(self.denoiser.config.guidance_embeds)
        side = int(self.vae.config.sample_size) // 2 ** (len(self.vae.config.block_out_channels) - 1)
        if side % 2:
            raise UserError(
                f"{self.name}: latents of {side} x {side} cannot be packed two by two; the side must be even"
            )
        self.patch_size = 2
        self.latent_shape = (int(self.denoiser.config.in_channels) // 4, side, side)

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Hidden states of the T5 (B, 512, D), and the CLIP's pooled output (B, D)."""
        tokenizer = self.tokenizers["tokenizer"]
        ids = token_ids(tokenizer, texts, tokenizer.model_max_length, self.device)
        long_ids = token_ids(self.tokenizers["tokenizer_2"], texts, T5_LENGTH, self.device)
        return {
            "encoder_hidden_states": self.text_encoders["text_encoder_2"](long_ids)[0],
            "pooled_projections": self.text_encoders["text_encoder"](ids).pooler_output,
        }

    def own_sigmas(self, steps: int) -> list[float] | None:
        """From 1 to 1/steps, evenly."""
        sigmas: list[float] = np.linspace(1.0, 1 / steps, steps).tolist()
        return sigmas

    def denoise(self, x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        """One pass through the transformer, which sees packed latents."""
        B, _, H, W = x_BCHW.shape
        told = condition.tensors
        packed = self.network(
            adapter,
            hidden_states=_packed(x_BCHW),
            timestep=torch.full((B,), t, device=x_BCHW.device, dtype=x_BCHW.dtype) / self.training_timesteps,
            guidance=told.get("guidance"),
            pooled_projections=told["pooled_projections"],
            encoder_hidden_states=told["encoder_hidden_states"],
            txt_ids=x_BCHW.new_zeros(told["encoder_hidden_states"].shape[1], 3),
            img_ids=_places(H // 2, W // 2).to(x_BCHW),
        )
        return packed.view(B, H // 2, W // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x_BCHW.shape)


def _packed(x_BCHW: Tensor) -> Tensor:
    """Two by two latents to one token, (B, H/2 * W/2, 4*C), row by row."""
    B, C, H, W = x_BCHW.shape
    return x_BCHW.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, 4 * C)


def _places(height: int, width: int) -> Tensor:
    """(0, row, column) of each token, (height * width, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)
