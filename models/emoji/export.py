"""Put the trained parts together as the folder of a StableDiffusionPipeline, and look at them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from models.emoji.autoencoder import psnr
from models.emoji.data import Sprites, balanced_indices, caption, compose
from models.emoji.denoiser import build_scheduler


def export_pipeline(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, folder: Path
) -> None:
    """Write the pipeline as fp16 safetensors; the modules passed in are left in fp16."""
    pipeline = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.contiguous_format).half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    prefix_text_weights(folder / "text_encoder" / "model.safetensors")
    # diffusers notes where the autoencoder was loaded from, which is nobody's business.
    config = folder / "vae" / "config.json"
    settings = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # Older versions of transformers look for these beside `tokenizer.json`.
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        source = Path(tokenizer.name_or_path) / name
        (folder / "tokenizer" / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")


def prefix_text_weights(path: Path) -> None:
    """Name the text encoder's weights as transformers 4 does: 5 saves without the prefix, but reads both."""
    prefix = "text_model."
    tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load the pipeline in fp32, silent."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = 10,
    guidance: float = 2.0,
    batch: int = 16,
) -> Tensor:
    """Return pictures float32 (N, 3, 64, 64) in [0, 1], one per prompt."""
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for start in range(0, len(prompts), batch):
        out = pipeline(
            list(prompts[start : start + batch]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="pt",
        )
        pictures.append(out.images.float().cpu())
    return torch.cat(pictures)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, sprites: Sprites, *, count: int, seed: int) -> float:
    """Return the PSNR in dB (of the mean squared error over all pixels) on fresh compositions."""
    generator = torch.Generator().manual_seed(seed)
    images = compose(sprites, balanced_indices(sprites, count, generator), generator).images
    squares = [
        (vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) - part).square().sum()
        for part in torch.split(images, 32)
    ]
    return psnr(float(sum(squares)) / images.numel())


def save_grid(pictures: Tensor, columns: int, path: Path, zoom: int = 1) -> None:
    """Save pictures (N, 3, H, W) in [0, 1] side by side as a PNG; N is a multiple of `columns`."""
    count, _, height, width = pictures.shape
    rows = count // columns
    tiles = pictures.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    array = (tiles.reshape(rows * height, columns * width, 3) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(array)
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    picture.save(path, optimize=True)


def sample_prompts(names: Sequence[str], count: int, seed: int) -> list[str]:
    """Return "a name" for `count` different names, in their given order."""
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return [caption(names[i]) for i in sorted(order[:count].tolist())]


def checksums(folder: Path) -> dict[str, str]:
    """Return path (relative to `folder`) to SHA-256 of every weight file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
