"""Train the embedded generator from the unpacked emoji packages.

    python -m models.emoji.train --data DIR --work DIR

Each stage resumes from its checkpoint in the work folder. `denoiser` needs `text`; `decoder` may run beside
both, on another core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from models.emoji.autoencoder import normalise_latents, train_autoencoder, train_decoder
from models.emoji.data import COLOURS, STYLES, Sprites, caption, load_sprites
from models.emoji.denoiser import CaptionedLatents, build_unet, encode_set, train_denoiser, train_text_encoder
from models.emoji.export import (
    checksums,
    export_pipeline,
    generate,
    load_pipeline,
    reconstruction_psnr,
    sample_prompts,
    save_grid,
)
from models.emoji.text import write_tokenizer

STAGES = ("vae", "decoder", "text", "denoiser", "export")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """What was run for the shipped weights.

    Attributes:
        seed: of everything.
        batch: pictures or latents per update.
        vae_steps: updates of encoder and decoder together.
        vae_lr: peak learning rate of that stage.
        decoder_steps: further updates of the decoder alone.
        decoder_lr: peak learning rate of that stage.
        latents: compositions encoded for the text encoder and the denoiser.
        drop: share of empty captions, for guidance.
        text_steps: updates of the text encoder.
        text_batch: pictures per update of that stage.
        text_lr: peak learning rate of that stage.
        denoiser_steps: updates of the UNet.
        denoiser_lr: peak learning rate of that stage.
        fresh: compositions that a PSNR is measured on.
    """

    seed: int = 0
    batch: int = 16
    vae_steps: int = 3200
    vae_lr: float = 2e-3
    decoder_steps: int = 5500
    decoder_lr: float = 5e-4
    latents: int = 12288
    drop: float = 0.1
    text_steps: int = 2500
    text_batch: int = 64
    text_lr: float = 6e-3
    denoiser_steps: int = 20000
    denoiser_lr: float = 2e-3
    fresh: int = 256


def stage_vae(sprites: Sprites, recipe: Recipe, work: Path) -> None:
    """Train the autoencoder, give its latents unit variance, and save it as `work/vae`."""
    vae = train_autoencoder(
        sprites, work, steps=recipe.vae_steps, batch=recipe.batch, lr=recipe.vae_lr, seed=recipe.seed
    )
    normalise_latents(vae, sprites, count=4 * recipe.fresh, seed=recipe.seed + 1)
    vae.save_pretrained(work / "vae")
    print(f"vae: PSNR {reconstruction_psnr(vae, sprites, count=recipe.fresh, seed=recipe.seed + 2):.2f} dB")


def load_vae(folder: Path) -> AutoencoderKL:
    """Return a stored autoencoder, laid out for speed on a CPU."""
    return AutoencoderKL.from_pretrained(folder).to(memory_format=torch.channels_last)


def stage_decoder(sprites: Sprites, recipe: Recipe, work: Path) -> None:
    """Sharpen the decoder under the frozen encoder; save as `work/vae-sharp`."""
    vae = train_decoder(
        load_vae(work / "vae"),
        sprites,
        work,
        steps=recipe.decoder_steps,
        batch=recipe.batch,
        lr=recipe.decoder_lr,
        seed=recipe.seed + 3,
    )
    vae.save_pretrained(work / "vae-sharp")
    print(f"decoder: PSNR {reconstruction_psnr(vae, sprites, count=recipe.fresh, seed=recipe.seed + 2):.2f} dB")


def make_tokenizer(sprites: Sprites, work: Path) -> CLIPTokenizer:
    """Learn the tokenizer from all captions; it depends on the vocabulary only."""
    captions = [
        caption(name, style, colour)
        for name in sprites.names
        for style in (*STYLES, None)
        for colour in (*COLOURS, None)
    ]
    return write_tokenizer(captions, work / "tokenizer")


def captioned_latents(sprites: Sprites, recipe: Recipe, work: Path) -> CaptionedLatents:
    """Return the encoded compositions, encoded now if they are not in the work folder."""
    vae = load_vae(work / "vae")
    latents = encode_set(vae, sprites, work / "latents.pt", count=recipe.latents, seed=recipe.seed + 4)
    return CaptionedLatents(latents, make_tokenizer(sprites, work), sprites.names, recipe.drop)


def stage_text(sprites: Sprites, recipe: Recipe, work: Path) -> None:
    """Train the text encoder; save it as `work/text_encoder`."""
    text_encoder = train_text_encoder(
        captioned_latents(sprites, recipe, work),
        make_tokenizer(sprites, work),
        work,
        steps=recipe.text_steps,
        batch=recipe.text_batch,
        lr=recipe.text_lr,
        seed=recipe.seed + 6,
    )
    text_encoder.save_pretrained(work / "text_encoder")


def stage_denoiser(sprites: Sprites, recipe: Recipe, work: Path) -> None:
    """Train the UNet; the checkpoint holds the result."""
    train_denoiser(
        captioned_latents(sprites, recipe, work),
        CLIPTextModel.from_pretrained(work / "text_encoder"),
        work,
        steps=recipe.denoiser_steps,
        batch=recipe.batch,
        lr=recipe.denoiser_lr,
        seed=recipe.seed + 5,
    )


def stage_export(sprites: Sprites, recipe: Recipe, work: Path, out: Path) -> None:
    """Write the pipeline and a sample grid from the averaged weights of the latest checkpoints."""
    sharp = work / "vae-sharp"
    vae = load_vae(sharp if sharp.exists() else work / "vae")
    checkpoint = work / "decoder.pt"
    if not sharp.exists() and checkpoint.exists():
        # The decoder is still in training: take what it has reached.
        average = torch.load(checkpoint, weights_only=True)["average"]
        vae.load_state_dict({**vae.state_dict(), **average})
    tokenizer = make_tokenizer(sprites, work)
    unet = build_unet()
    state = torch.load(work / "denoiser.pt", weights_only=True)
    unet.load_state_dict({**state["module"], **state["average"]})
    export_pipeline(vae, tokenizer, CLIPTextModel.from_pretrained(work / "text_encoder"), unet, out / "pipeline")
    pipeline = load_pipeline(out / "pipeline")
    quality = reconstruction_psnr(pipeline.vae, sprites, count=recipe.fresh, seed=recipe.seed + 2)
    print(f"denoiser: {state['step']} steps in {state['seconds']:.0f} s; PSNR {quality:.2f} dB")
    for path, digest in checksums(out / "pipeline").items():
        print(f"{digest}  pipeline/{path}")
    count = min(48, len(sprites.names) // 8 * 8) or 1
    prompts = sample_prompts(sprites.names, count, recipe.seed)
    save_grid(generate(pipeline, prompts, seed=recipe.seed), min(8, count), out / "samples.png")
    print("samples.png, row by row: " + ", ".join(prompts))


def train(sprites: Sprites, recipe: Recipe, stages: Sequence[str], work: Path, out: Path) -> None:
    """Run the named stages in their order."""
    work.mkdir(parents=True, exist_ok=True)
    if "vae" in stages:
        stage_vae(sprites, recipe, work)
    if "decoder" in stages:
        stage_decoder(sprites, recipe, work)
    if "text" in stages:
        stage_text(sprites, recipe, work)
    if "denoiser" in stages:
        stage_denoiser(sprites, recipe, work)
    if "export" in stages:
        stage_export(sprites, recipe, work, out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with google, twitter, fluent")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and encoded pictures")
    parser.add_argument("--out", type=Path, default=HERE, help="where `pipeline` and the sample grid go")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--threads", type=int, default=1, help="more than one pays only on an idle machine")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--vae-steps", type=int, default=recipe.vae_steps)
    parser.add_argument("--decoder-steps", type=int, default=recipe.decoder_steps)
    parser.add_argument("--text-steps", type=int, default=recipe.text_steps)
    parser.add_argument("--denoiser-steps", type=int, default=recipe.denoiser_steps)
    parser.add_argument("--latents", type=int, default=recipe.latents, help="compositions encoded once")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    recipe = Recipe(
        seed=given.seed,
        vae_steps=given.vae_steps,
        decoder_steps=given.decoder_steps,
        text_steps=given.text_steps,
        denoiser_steps=given.denoiser_steps,
        latents=given.latents,
    )
    stages = STAGES if given.stage == "all" else (given.stage,)
    train(load_sprites(given.data), recipe, stages, given.work, given.out)


if __name__ == "__main__":
    main()
