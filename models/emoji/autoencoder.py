"""The autoencoder of the embedded generator: 64x64 pictures to 8x8 latents of 16 channels and back."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from models.emoji.data import SIZE, Sprites, balanced_indices, compose
from models.emoji.loop import Stage

LATENT_CHANNELS = 16
CHANNELS = (16, 16, 48, 96)


def build_autoencoder() -> AutoencoderKL:
    """Return an untrained AutoencoderKL.

    Most channels sit at 8x8 and 16x16, where they are cheap: a decode with gradient is what reward
    fine-tuning pays for. Two normalisation groups, because groups of one or two channels would wipe out
    the mean of a channel, and with it the background's colour.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
    )
    return vae.to(memory_format=torch.channels_last)


def reconstruction_loss(out: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (loss, mean squared error) of pictures (B, 3, 64, 64) in [-1, 1].

    The differences of neighbouring pixels enter on their own, since L1 and L2 alone leave edges soft.
    """
    error = out - target
    square = error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return 0.5 * error.abs().mean() + 2.0 * square + 0.5 * edges, square


def psnr(square: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error on [-1, 1]."""
    return 10 * math.log10(4.0 / square)


def train_autoencoder(
    sprites: Sprites, folder: Path, *, steps: int, batch: int, lr: float, seed: int, kl: float = 1e-3
) -> AutoencoderKL:
    """Train encoder and decoder together; return them with averaged weights.

    Args:
        sprites: what to compose pictures from.
        folder: where the checkpoint goes.
        steps: planned number of updates.
        batch: pictures per update.
        lr: peak learning rate.
        seed: of the weights and of all draws.
        kl: weight of the mean divergence per latent value. It keeps the posterior's standard deviation at
            a few per cent of the latents', enough for the decoder to forgive the denoiser's small errors.
    """
    torch.manual_seed(seed)
    vae = build_autoencoder()
    generator = torch.Generator().manual_seed(seed)
    stage = Stage("vae", vae, folder, steps=steps, lr=lr, generator=generator, decay=0.998)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = compose(sprites, balanced_indices(sprites, batch, generator), generator).images
        images = images.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(batch, LATENT_CHANNELS, SIZE // 8, SIZE // 8, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            posterior.mean, posterior.std = posterior.mean.float(), posterior.std.float()
            out = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        loss, square = reconstruction_loss(out, images)
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        figures = {"psnr": psnr(square.item()), "kl": divergence.item(), "std": posterior.std.mean().item()}
        return loss + kl * divergence, figures

    stage.run(loss_of)
    return vae


def train_decoder(
    vae: AutoencoderKL, sprites: Sprites, folder: Path, *, steps: int, batch: int, lr: float, seed: int
) -> AutoencoderKL:
    """Go on with the decoder alone; the encoder, and with it every stored latent, stays as it is.

    The arguments are those of `train_autoencoder`; latents are blurred by a fixed 5 % of their spread.
    """
    vae.requires_grad_(False)
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    decoder.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    stage = Stage("decoder", decoder, folder, steps=steps, lr=lr, generator=generator, decay=0.999)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        images = compose(sprites, balanced_indices(sprites, batch, generator), generator).images
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mean.float()
            latents = latents + 0.05 * torch.randn(latents.shape, generator=generator)
            out = vae.decode(latents).sample.float()
        loss, square = reconstruction_loss(out, images)
        return loss, {"psnr": psnr(square.item())}

    stage.run(loss_of)
    return vae


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, sprites: Sprites, *, count: int, seed: int) -> None:
    """Rewrite the 1x1 convolutions beside the latents so that each channel has mean 0 and variance 1.

    StableDiffusionPipeline knows one scaling factor only; folding the affine map into the weights leaves
    that factor at 1. Posterior log-variances are moved along, reconstructions do not change.
    """
    generator = torch.Generator().manual_seed(seed)
    images = compose(sprites, balanced_indices(sprites, count, generator), generator).images
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(images, 64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    # quant_conv: rows 0..15 are means, rows 16..31 log-variances.
    before.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    before.bias[:LATENT_CHANNELS] = (before.bias[:LATENT_CHANNELS] - mean) / std
    before.bias[LATENT_CHANNELS:] -= 2 * std.log()
    after.bias += (after.weight[:, :, 0, 0] * mean[None]).sum(1)
    after.weight *= std[None, :, None, None]
