"""The families beyond Stable Diffusion 1: how each is stored, read here and read by diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline

from harness.api import Prompt, Randomness, Request
from models._latent_diffusion import LatentDiffusion
from models.flux import Flux
from models.sdxl import StableDiffusionXL
from models.stable_diffusion_3 import StableDiffusion3
from tests.models.tiny_pipelines import save_flux, save_sd3, save_sdxl

LONG = "a dog and a cat sit in a very small house by the sea"  # more letters than the tiny CLIPs have places


@dataclass(frozen=True)
class Family:
    """How a pipeline is stored, read here and read by diffusers, and what its call needs beside the usual."""

    save: Callable[[Path], Path]
    model: type[LatentDiffusion]
    pipeline: type[Any]
    components: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    two_scales: bool = False


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
SIZE = {"height": 16, "width": 16}
FAMILIES = {
    "sdxl": Family(save_sdxl, StableDiffusionXL, StableDiffusionXLPipeline),
    "sdxl encoding the empty prompt": Family(
        lambda path: save_sdxl(path, force_zeros_for_empty_prompt=False), StableDiffusionXL, StableDiffusionXLPipeline
    ),
    "sd3": Family(save_sd3, StableDiffusion3, StableDiffusion3Pipeline),
    "sd3.5 without T5": Family(
        lambda path: save_sd3(path, with_t5=False, dual=True), StableDiffusion3, StableDiffusion3Pipeline, NO_T5
    ),
    "sd3 dynamic": Family(
        lambda path: save_sd3(path, use_dynamic_shifting=True), StableDiffusion3, StableDiffusion3Pipeline
    ),
    "flux dev": Family(lambda path: save_flux(path, guidance_embeds=True), Flux, FluxPipeline, call=SIZE),
    # Pipelines call classifier-free guidance of FLUX "true", and take it where there is a negative prompt.
    "flux schnell": Family(
        lambda path: save_flux(path, guidance_embeds=False),
        Flux,
        FluxPipeline,
        call={**SIZE, "negative_prompt": [""] * 3},
        two_scales=True,
    ),
}
MAIN = ["sdxl", "sd3", "flux dev"]


def batch(model: LatentDiffusion) -> list[Request]:
    """Three prompts, one too long."""
    noise = Randomness(5)
    texts = ["cat", "a dog", LONG]
    return [Request(Prompt(t, t), i, noise.normal(model.latent_shape, i)) for i, t in enumerate(texts)]
