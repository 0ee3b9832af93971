"""Stable Diffusion 3 and 3.5, and everything else stored as a diffusers `StableDiffusion3Pipeline`."""

from __future__ import annotations

from typing import final

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from harness.api import Adapter, Conditioning, UserError
from models._flow import FlowMatching
from models._parts import Layout, token_ids

PIPELINES = ("StableDiffusion3Pipeline",)
T5_LENGTH = 256  # the pipeline's max_sequence_length


def load(source: str, device: torch.device, dtype: torch.dtype, revision: str | None) -> StableDiffusion3:
    """The model stored in a directory or known by a hub id."""
    return StableDiffusion3(source, device, dtype, revision)


@final
class StableDiffusion3(FlowMatching):
    """A transformer that is told hidden states and pooled embeddings of two CLIP text encoders, and of a T5.

    The T5 (`text_encoder_3`, `tokenizer_3`) may be absent: `[null, null]` in `model_index.json`; its rows are then
    zero. Guidance is classifier-free. Other arguments and errors are those of `LatentDiffusion`.
    """

    layout = Layout(
        pipeline=StableDiffusion3Pipeline,
        denoiser=("transformer", SD3Transformer2DModel),
        text_encoders={
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
        },
        tokenizers={"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast},
        scheduler=FlowMatchEulerDiscreteScheduler,
        optional=frozenset({"text_encoder_3", "tokenizer_3"}),
    )

    def __init__(
        self, source: str, device: torch.device, dtype: torch.dtype = torch.float32, revision: str | None = None
    ) -> None:
        super().__init__(source, device, dtype, revision)
        self.patch_size = int(self.denoiser.config.patch_size)
        if ("text_encoder_3" in self.text_encoders) != ("tokenizer_3" in self.tokenizers):
            raise UserError(
                f"{source}: model_index.json leaves out one of text_encoder_3 and tokenizer_3; give [null, null] for "
                "both, or for neither"
            )
        side = int(self.denoiser.config.sample_size)
        self.latent_shape = (int(self.denoiser.config.in_channels), side, side)

    def encode_texts(self, texts: list[str]) -> dict[str, Tensor]:
        """Hidden states of the CLIPs side by side, followed by the T5's (B, L + 256, D), and both projections."""
        hidden, pooled = [], []
        length = self.tokenizers["tokenizer"].model_max_length
        for suffix in ("", "_2"):
            ids = token_ids(self.tokenizers[f"tokenizer{suffix}"], texts, length, self.device)
            output = self.text_encoders[f"text_encoder{suffix}"](ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output[0])
        clip = torch.cat(hidden, -1)
        if "text_encoder_3" in self.text_encoders:
            t5 = self.text_encoders["text_encoder_3"](
                token_ids(self.tokenizers["tokenizer_3"], texts, T5_LENGTH, self.device)
            )[0]
        else:
            t5 = clip.new_zeros(len(texts), T5_LENGTH, self.denoiser.config.joint_attention_dim)
        clip = functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"encoder_hidden_states": torch.cat([clip, t5], 1), "pooled_projections": torch.cat(pooled, -1)}

    def own_sigmas(self, steps: int) -> list[float] | None:
        """The scheduler's own."""
        return None

    def denoise(self, x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        """One pass through the transformer."""
        timestep = torch.full((len(x_BCHW),), t, device=x_BCHW.device)
        return self.network(adapter, hidden_states=x_BCHW, timestep=timestep, **condition.tensors)
