"""The denoiser of the embedded generator: a small UNet on 8x8 latents, trained with its text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.emoji.autoencoder import LATENT_CHANNELS
from models.emoji.data import COLOURS, STYLES, Jitter, Sprites, balanced_indices, caption, compose
from models.emoji.loop import Stage, save_atomically
from models.emoji.text import GRID, MAX_LENGTH, WIDTH, build_text_encoder

# Nearly fixed, and no mirror images: on a CPU the denoiser has to learn the shapes themselves first, and
# every further pose is one more shape. A latent covers 8 pixels, so that a shift of two changes all of them.
PLACEMENT = Jitter(scale=(0.87, 0.89), shift=0.5, flip=0.0, name_style=0.7, name_colour=0.7)


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
def encode_set(vae: AutoencoderKL, sprites: Sprites, path: Path, *, count: int, seed: int) -> LatentSet:
    """Return `count` encoded compositions (posterior means), from `path` if they are stored there."""
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        latents, name_id, style_id, colour_id = [], [], [], []
        for start in range(0, count, 64):
            rows = balanced_indices(sprites, min(64, count - start), generator)
            batch = compose(sprites, rows, generator, PLACEMENT)
            images = batch.images.contiguous(memory_format=torch.channels_last)
            latents.append(vae.encode(images).latent_dist.mean.contiguous())
            name_id.append(batch.name_id)
            style_id.append(batch.true_style)
            colour_id.append(batch.true_colour)
        parts = (latents, name_id, style_id, colour_id)
        save_atomically({"parts": [torch.cat(part) for part in parts]}, path)
    return LatentSet(*torch.load(path, weights_only=True)["parts"])


class CaptionedLatents:
    """Draws of encoded pictures with captions that say more or less about them.

    Args:
        latents: the encoded pictures.
        tokenizer: of the captions.
        names: the vocabulary that `name_id` points into.
        drop: probability of an empty caption, for guidance.

    Attributes:
        tokens: int64 (captions, 24): every caption there is, the empty one last.
    """

    def __init__(self, latents: LatentSet, tokenizer: CLIPTokenizer, names: tuple[str, ...], drop: float) -> None:
        self.latents, self.drop = latents, drop
        styles, colours = (*STYLES, None), (*COLOURS, None)
        captions = [caption(name, style, colour) for name in names for style in styles for colour in colours]
        encoded = tokenizer([*captions, ""], padding="max_length", truncation=True, max_length=MAX_LENGTH)
        self.tokens = torch.tensor(encoded["input_ids"])
        # Every name equally often, whatever the stored set drew.
        self.weights = 1.0 / torch.bincount(latents.name_id, minlength=len(names)).double()[latents.name_id]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents (count, 16, 8, 8) and rows of `tokens`, int64 (count,)."""

        def chance(p: float) -> Tensor:
            return torch.rand(count, generator=generator) < p

        rows = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        style = torch.where(chance(PLACEMENT.name_style), self.latents.style_id[rows], len(STYLES))
        colour = torch.where(chance(PLACEMENT.name_colour), self.latents.colour_id[rows], len(COLOURS))
        said = (self.latents.name_id[rows] * (len(STYLES) + 1) + style) * (len(COLOURS) + 1) + colour
        return self.latents.latents[rows], torch.where(chance(self.drop), len(self.tokens) - 1, said)


class PictureFromCaption(nn.Module):
    """The text encoder with a linear read-out of the picture: the task that it learns before the UNet.

    Trained with the UNet from a random start, it takes tens of thousands of updates until captions tell
    the animals apart. Asked for the mean picture of a caption it takes a thousand, and the UNet then
    finds each cell's content in one token, whatever the animal.
    """

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.cell = 8 // GRID
        self.read_out = nn.Linear(WIDTH, LATENT_CHANNELS * self.cell**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the expected latents (B, 16, 8, 8) of captions (B, 24): token 8 + i shows cell i."""
        # bfloat16 speeds up batches this large on processors that have it.
        with torch.autocast("cpu", torch.bfloat16):
            states = self.text_encoder(tokens)[0][:, -(GRID**2) :]
        cells = self.read_out(states.float()).view(-1, GRID, GRID, LATENT_CHANNELS, self.cell, self.cell)
        picture: Tensor = cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, LATENT_CHANNELS, 8, 8)
        return picture


def train_text_encoder(
    data: CaptionedLatents, tokenizer: CLIPTokenizer, folder: Path, *, steps: int, batch: int, lr: float, seed: int
) -> CLIPTextModel:
    """Train the text encoder to foretell the latents of a caption's picture (mean squared error).

    Args:
        data: latents and captions.
        tokenizer: of the captions.
        folder: where the checkpoint goes.
        steps: planned number of updates.
        batch: rows per update.
        lr: peak learning rate.
        seed: of the weights and of all draws.
    """
    torch.manual_seed(seed)
    module = PictureFromCaption(build_text_encoder(tokenizer))
    matrices = [p for name, p in module.text_encoder.named_parameters() if p.ndim == 2 and "embedding" not in name]

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        clean, said = data.draw(batch, generator)
        return (module(data.tokens[said]) - clean).square().mean(), {}

    generator = torch.Generator().manual_seed(seed)
    stage = Stage("text", module, folder, steps=steps, lr=lr, generator=generator, decay=0.998, orthogonal=matrices)
    stage.run(loss_of)
    return module.text_encoder


def train_denoiser(
    data: CaptionedLatents, text_encoder: CLIPTextModel, folder: Path, *, steps: int, batch: int, lr: float, seed: int
) -> UNet2DConditionModel:
    """Train the UNet on stored latents under the frozen text encoder; return it with averaged weights.

    The loss is the mean squared error of the velocity: with this target every noise level has errors of
    the same size. High noise levels, where ten sampling steps decide on the shape, are drawn more often at
    first: a timestep is 1000*u^p with uniform u, and p grows from 0.4 to 1 along the training.

    Args:
        data: latents and captions.
        text_encoder: trained; its states of all captions are computed once.
        folder: where the checkpoint goes.
        steps: planned number of updates.
        batch: rows per update.
        lr: peak learning rate.
        seed: of the weights and of all draws.
    """
    torch.manual_seed(seed)
    unet = build_unet()
    alphas = build_scheduler().alphas_cumprod
    with torch.no_grad():
        states = torch.cat([text_encoder(part)[0] for part in data.tokens.split(256)])

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        clean, said = data.draw(batch, generator)
        power = 0.4 + 0.6 * stage.step / stage.steps
        timestep = (torch.rand(batch, generator=generator).pow(power) * len(alphas)).long().clamp_max(len(alphas) - 1)
        noise = torch.randn(clean.shape, generator=generator)
        signal = alphas[timestep].sqrt()[:, None, None, None]
        spread = (1 - alphas[timestep]).sqrt()[:, None, None, None]
        # bfloat16 speeds up the UNet on processors that have it.
        with torch.autocast("cpu", torch.bfloat16):
            out = unet(signal * clean + spread * noise, timestep, states[said]).sample
        # A row's error, then the mean: the progress line also shows the noisiest fifth.
        error = (out.float() - (signal * noise - spread * clean)).square().mean((1, 2, 3))
        high = error[timestep >= 800]
        return error.mean(), {"high": high.mean().item() if len(high) else float("nan")}

    generator = torch.Generator().manual_seed(seed)
    stage = Stage("denoiser", unet, folder, steps=steps, lr=lr, generator=generator, decay=0.9993, warmup=500)
    stage.run(loss_of)
    return unet
