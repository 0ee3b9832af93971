"""Pipelines of random tiny weights, saved in the layouts of SDXL, SD3 and FLUX: 16x16 pictures, 8x8 latents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
CLIP_VOCABULARY = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
T5_VOCABULARY = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
CLIP_LENGTH = 16


def save_sdxl(directory: Path, **options: Any) -> Path:
    """A `StableDiffusionXLPipeline`; `options` go to it."""

    def build() -> StableDiffusionXLPipeline:
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=40,
            attention_head_dim=2,
            transformer_layers_per_block=1,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 20,
            use_linear_projection=True,
        )
        return StableDiffusionXLPipeline(
            vae=autoencoder(latent_channels=4, scaling_factor=0.8),
            text_encoder=CLIPTextModel(clip_config(16, 16)),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(24, 20)),
            tokenizer=clip_tokenizer(directory),
            tokenizer_2=clip_tokenizer(directory, pad="!"),
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
            add_watermarker=False,
            **options,
        )

    return saved(directory, build)


def save_sd3(directory: Path, with_t5: bool = True, dual: bool = False, **scheduler: Any) -> Path:
    """A `StableDiffusion3Pipeline`, by default with the shift of 3; `dual` has SD3.5 medium's second attention."""

    def build() -> StableDiffusion3Pipeline:
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=16 + 20,
            pos_embed_max_size=8,
            dual_attention_layers=(0,) if dual else (),
            qk_norm="rms_norm" if dual else None,
        )
        return StableDiffusion3Pipeline(
            vae=autoencoder(latent_channels=4, scaling_factor=0.8, shift_factor=0.1),
            text_encoder=CLIPTextModelWithProjection(clip_config(16, 16)),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(24, 20)),
            text_encoder_3=t5(48) if with_t5 else None,
            tokenizer=clip_tokenizer(directory),
            tokenizer_2=clip_tokenizer(directory, pad="!"),
            tokenizer_3=t5_tokenizer() if with_t5 else None,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        )

    return saved(directory, build)


def save_flux(directory: Path, guidance_embeds: bool, **scheduler: Any) -> Path:
    """A `FluxPipeline`: with embedded guidance and dynamic shifting as dev, or without either as schnell."""

    def build() -> FluxPipeline:
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        shifting = {"use_dynamic_shifting": guidance_embeds, "shift": 3.0 if guidance_embeds else 1.0, **scheduler}
        return FluxPipeline(
            vae=autoencoder(latent_channels=4, scaling_factor=0.8, shift_factor=0.1),
            text_encoder=CLIPTextModel(clip_config(16, 16)),
            text_encoder_2=t5(48),
            tokenizer=clip_tokenizer(directory),
            tokenizer_2=t5_tokenizer(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(**shifting),
        )

    return saved(directory, build)


def saved(directory: Path, build: Callable[[], Any]) -> Path:
    """Build from a fixed seed, make zero-initialised and tiny layers count, and save."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = build()
        denoiser = pipeline.components.get("unet") or pipeline.components["transformer"]
        with torch.no_grad():
            for name, parameter in denoiser.named_parameters():
                if name.endswith("weight") and parameter.ndim > 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    pipeline.save_pretrained(directory)
    return directory


def autoencoder(**options: Any) -> AutoencoderKL:
    """Of 16x16 pictures and 8x8 latents."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def clip_config(width: int, projection: int) -> CLIPTextConfig:
    """Two layers: the last hidden state but one is none of the embeddings."""
    return CLIPTextConfig(
        vocab_size=len(CLIP_VOCABULARY) + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=projection,
        bos_token_id=0,
        eos_token_id=1,
    )


def clip_tokenizer(directory: Path, pad: str | None = None) -> CLIPTokenizer:
    """Letters as tokens; the second tokenizers of SDXL and SD3 pad with an exclamation mark."""
    directory.mkdir(parents=True, exist_ok=True)
    words = {token: i for i, token in enumerate([*CLIP_VOCABULARY, "!"])}
    (directory / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    options = {} if pad is None else {"pad_token": pad}
    return CLIPTokenizer.from_pretrained(str(directory), model_max_length=CLIP_LENGTH, **options)


def t5(width: int) -> T5EncoderModel:
    """One layer."""
    config = T5Config(
        vocab_size=len(T5_VOCABULARY), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config)


def t5_tokenizer() -> T5TokenizerFast:
    """Letters as tokens, with and without the space before them."""
    return T5TokenizerFast(
        vocab=[(token, 0.0 if i < 3 else -1.0) for i, token in enumerate(T5_VOCABULARY)], extra_ids=0
    )
