"""The denoiser of the embedded generator: a small UNet on 8x8 latents, trained with its text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.emoji.autoencoder import LATENT_CHANNELS
from models.emoji.data import COLOURS, STYLES, Jitter, Sprites, balanced_indices, caption, compose
from models.emoji.loop import Stage, save_atomically
from models.emoji.text import MAX_LENGTH, WIDTH, build_text_encoder

# Less freedom than the autoencoder sees, and no mirror images: on a CPU the denoiser has to learn the
# shapes themselves first, and every further pose is one more shape. A latent covers 8 pixels, so that a
# shift of two changes all of them; the tight placement that follows the loose one is what makes outlines
# settle.
LOOSE = Jitter(scale=(0.84, 0.92), shift=2.0, flip=0.0)
TIGHT = Jitter(scale=(0.87, 0.89), shift=0.5, flip=0.0)


@dataclass(frozen=True)
class LatentSet:
    """Compositions encoded once.

    Attributes:
        latents: float32 (N, 16, 8, 8), about unit variance.
        name_id: int64 (N,).
        style_id: int64 (N,), the true style.
        colour_id: int64 (N,), the true background colour.
    """

    latents: Tensor
    name_id: Tensor
    style_id: Tensor
    colour_id: Tensor


def build_unet() -> UNet2DConditionModel:
    """Return an untrained UNet with cross-attention at 4x4 and no middle block.

    With so little arithmetic the number of modules costs as much as their width: without a middle block
    and attention at 8x8 the same time buys wider layers. The caption also enters pooled, beside the
    timestep, which names the object to every layer.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(96, 160),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        # diffusers reads this as the number of heads.
        attention_head_dim=5,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule, with velocity prediction and trailing steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


@torch.no_grad()
def encode_set(
    vae: AutoencoderKL, sprites: Sprites, path: Path, placement: Jitter, *, count: int, seed: int
) -> LatentSet:
    """Return `count` encoded compositions (posterior means), from `path` if they are stored there."""
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        latents, name_id, style_id, colour_id = [], [], [], []
        for start in range(0, count, 64):
            rows = balanced_indices(sprites, min(64, count - start), generator)
            batch = compose(sprites, rows, generator, placement)
            images = batch.images.contiguous(memory_format=torch.channels_last)
            latents.append(vae.encode(images).latent_dist.mean.contiguous())
            name_id.append(batch.name_id)
            style_id.append(batch.true_style)
            colour_id.append(batch.true_colour)
        parts = (latents, name_id, style_id, colour_id)
        save_atomically({"parts": [torch.cat(part) for part in parts]}, path)
    return LatentSet(*torch.load(path, weights_only=True)["parts"])


def token_table(tokenizer: CLIPTokenizer, names: tuple[str, ...]) -> Tensor:
    """Return the tokens of every caption, int64 (names, styles + 1, colours + 1, 24); last means unsaid."""
    captions = [
        caption(name, style, colour) for name in names for style in (*STYLES, None) for colour in (*COLOURS, None)
    ]
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return torch.tensor(tokens).view(len(names), len(STYLES) + 1, len(COLOURS) + 1, MAX_LENGTH)


class Denoiser(nn.Module):
    """UNet and text encoder as one module, since they are trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """Return the predicted velocity (B, 16, 8, 8) of latents at timesteps (B,), given tokens (B, 24)."""
        # bfloat16 speeds up the UNet on processors that have it, and slows down the narrow text encoder.
        context = self.text_encoder(tokens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            velocity: Tensor = self.unet(noisy, timestep, context).sample
        return velocity.float()


def train_denoiser(
    phases: Sequence[tuple[int, LatentSet]],
    tokenizer: CLIPTokenizer,
    names: tuple[str, ...],
    folder: Path,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    drop: float = 0.1,
) -> Denoiser:
    """Train UNet and text encoder on stored latents; return them with averaged weights.

    The loss is the mean squared error of the velocity at uniform timesteps: with this target every noise
    level has errors of the same size, so no weights are needed for the high noise levels, where ten
    sampling steps decide on the shape.

    Args:
        phases: training sets in their order, each with the update that it begins at; the first with 0.
        tokenizer: of the captions.
        names: the vocabulary that `name_id` points into.
        folder: where the checkpoint goes.
        steps: planned number of updates.
        batch: rows per update.
        lr: peak learning rate.
        seed: of the weights and of all draws.
        drop: probability of an empty caption, for guidance.
    """
    torch.manual_seed(seed)
    denoiser = Denoiser(build_unet(), build_text_encoder(tokenizer))
    alphas = build_scheduler().alphas_cumprod
    table = token_table(tokenizer, names)
    empty = tokenizer([""], padding="max_length", max_length=MAX_LENGTH)["input_ids"]
    nothing = torch.tensor(empty)
    # Every name equally often, whatever the stored sets drew.
    weights = [1.0 / torch.bincount(part.name_id, minlength=len(names)).double()[part.name_id] for _, part in phases]

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        def chance(p: float) -> Tensor:
            return torch.rand(batch, generator=generator) < p

        phase = sum(stage.step >= start for start, _ in phases) - 1
        latents = phases[phase][1]
        rows = torch.multinomial(weights[phase], batch, replacement=True, generator=generator)
        clean = latents.latents[rows]
        style = torch.where(chance(LOOSE.name_style), latents.style_id[rows], len(STYLES))
        colour = torch.where(chance(LOOSE.name_colour), latents.colour_id[rows], len(COLOURS))
        tokens = table[latents.name_id[rows], style, colour]
        tokens = torch.where(chance(drop)[:, None], nothing, tokens)
        timestep = torch.randint(len(alphas), (batch,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        signal = alphas[timestep].sqrt()[:, None, None, None]
        spread = (1 - alphas[timestep]).sqrt()[:, None, None, None]
        out = denoiser(signal * clean + spread * noise, timestep, tokens)
        # A row's error, then the mean: the progress line also shows the noisiest fifth.
        error = (out - (signal * noise - spread * clean)).square().mean((1, 2, 3))
        high = error[timestep >= 800]
        return error.mean(), {"high": high.mean().item() if len(high) else float("nan")}

    generator = torch.Generator().manual_seed(seed)
    stage = Stage("denoiser", denoiser, folder, steps=steps, lr=lr, generator=generator, decay=0.9993, warmup=500)
    stage.run(loss_of)
    return denoiser
