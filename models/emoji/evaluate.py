"""Judge the embedded generator: does it draw the right animal, style and background?

`python -m models.emoji.evaluate` generates pictures of the animals of the prompt suite `emoji-animals` at
the sampler of the preset `quick` (DDIM, 10 steps, trailing spacing, guidance 2, eta 0) and judges them:

- the animal, by the gold classifier `critics/object`;
- the style, by `critics/style3d`;
- the background, by the colour nearest to the median of the 4-pixel border.

With `--data DIR` (the unpacked sprites) it also states the reconstruction error of the autoencoder and the
classifier's own accuracy, both on fresh compositions. It prints a table and writes `evaluation.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.emoji import _critic_nets as nets
from models.emoji.data import COLOURS, STYLES, balanced_indices, caption, compose, load_sprites

FOLDER = Path(__file__).parent
BORDER = 4
# As in the prompt suite `emoji-animals`; a test compares them.
TRAINING = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
    "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
    "dolphin", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "pig", "turkey", "fly",
    "llama", "bat", "gorilla", "hedgehog", "kangaroo",
)  # fmt: skip
HELD_OUT = (
    "elephant", "penguin", "koala", "owl", "giraffe", "crab", "octopus", "snail", "hippopotamus", "crocodile",
    "lobster", "panda", "polar bear", "rhinoceros", "flamingo", "peacock", "parrot", "swan", "eagle", "rooster",
    "seal", "jellyfish", "shrimp", "squid", "scorpion", "lady beetle", "sloth", "hamster", "leopard", "blowfish",
    "moose", "skunk",
)  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """How pictures are generated (DDIM, eta 0).

    Attributes:
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        spacing: `timestep_spacing` of the scheduler.
        batch: pictures at a time.
    """

    steps: int = 10
    guidance: float = 2.0
    spacing: str = "trailing"
    batch: int = 24


@dataclass(frozen=True)
class Wanted:
    """One picture to generate; `style` and `colour` are None where the prompt does not name them."""

    name: str
    latent: int
    style: str | None = None
    colour: str | None = None

    @property
    def prompt(self) -> str:
        """The prompt, worded as the captions that the generator learnt from."""
        return caption(self.name, self.style, self.colour)

    @property
    def seed(self) -> int:
        """Seed of the initial latent: a hash of what is wanted."""
        digest = hashlib.sha256(f"{self.prompt}/{self.latent}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


def load_pipeline(folder: Path, sampler: Sampler) -> Any:
    """Return the diffusers pipeline of `folder` in float32 with the sampler's DDIM scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.float()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=sampler.spacing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, wanted: Sequence[Wanted], sampler: Sampler) -> Tensor:
    """Return the pictures, float32 (N, 3, H, W) in [0, 1]; each depends on nothing but its own entry."""
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    parts = []
    for start in range(0, len(wanted), sampler.batch):
        some = wanted[start : start + sampler.batch]
        noise = [
            torch.randn(channels, size, size, generator=torch.Generator().manual_seed(entry.seed)) for entry in some
        ]
        result = pipeline(
            [entry.prompt for entry in some],
            latents=torch.stack(noise),
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            eta=0.0,
            output_type="pt",
        )
        parts.append(result.images)
        print(f"\r{start + len(some)}/{len(wanted)} pictures", end="", flush=True)
    print()
    return torch.cat(parts).float()


def background(images: Tensor) -> Tensor:
    """Return the index in `COLOURS` nearest to the median of the border, int64 (B,).

    Args:
        images: (B, 3, H, W) in [0, 1].
    """
    edge = torch.ones(images.shape[-2:], dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    median = images[:, :, edge].median(-1).values
    table = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    return torch.cdist(median, table).argmin(1)


def predictions(model: nn.Module, images: Tensor) -> list[str]:
    """Return the label that a classifier gives to each picture (B, 3, 64, 64) in [0, 1]."""
    labels: Any = model.config
    with torch.no_grad():
        best = torch.cat([nets.logits(model, part).argmax(1) for part in torch.split(images, 100)])
    return [labels.id2label[index] for index in best.tolist()]


def share(right: Sequence[bool]) -> float:
    """Return the share of True, rounded to four digits."""
    return round(sum(right) / len(right), 4)


def objects(
    pipeline: Any, names: Sequence[str], latents: int, sampler: Sampler
) -> tuple[dict[str, Any], Tensor, list[Wanted]]:
    """Return object figures of "a {name}", with the pictures and what was wanted of each."""
    wanted = [Wanted(name, latent) for name in names for latent in range(latents)]
    images = generate(pipeline, wanted, sampler)
    found = predictions(nets.load("object"), images)
    right = [label == entry.name for label, entry in zip(found, wanted, strict=True)]
    animals = {name: share(right[i * latents : (i + 1) * latents]) for i, name in enumerate(names)}
    mistaken: dict[str, str] = {}
    for name in sorted(animals, key=lambda name: animals[name])[:10]:
        others = [label for label, entry in zip(found, wanted, strict=True) if entry.name == name != label]
        mistaken[name] = max(sorted(set(others)), key=others.count, default="")
    figures = {
        "object_accuracy": share(right),
        "pictures": len(right),
        "worst": {name: {"accuracy": animals[name], "taken_for": taken} for name, taken in mistaken.items()},
        "by_animal": animals,
    }
    return figures, images, wanted


def styles(pipeline: Any, names: Sequence[str], latents: int, sampler: Sampler) -> dict[str, float]:
    """Return style and object accuracy of "a {style} {name}"."""
    wanted = [Wanted(name, k, style) for name in names for style in STYLES for k in range(latents)]
    images = generate(pipeline, wanted, sampler)
    style_found = predictions(nets.load("style3d"), images)
    second_opinion = predictions(nets.load("style3d_heldout"), images)
    object_found = predictions(nets.load("object"), images)
    rows = list(zip(wanted, style_found, second_opinion, object_found, strict=True))
    figures = {
        "style_accuracy": share([entry.style == style for entry, style, _, _ in rows]),
        "style_accuracy_second_classifier": share([entry.style == style for entry, _, style, _ in rows]),
        "object_accuracy": share([entry.name == label for entry, _, _, label in rows]),
    }
    for which in STYLES:
        own = [row for row in rows if row[0].style == which]
        figures[f"style_accuracy_{which}"] = share([style == which for _, style, _, _ in own])
        figures[f"object_accuracy_{which}"] = share([entry.name == label for entry, _, _, label in own])
    return figures


def backgrounds(pipeline: Any, names: Sequence[str], each: int, sampler: Sampler) -> dict[str, float]:
    """Return background and object accuracy of "a {name} on a {colour} background", `each` colours a name."""
    table = list(COLOURS)
    wanted = [
        Wanted(name, 0, colour=table[(i * each + k) % len(table)]) for i, name in enumerate(names) for k in range(each)
    ]
    images = generate(pipeline, wanted, sampler)
    right = [table[index] == entry.colour for index, entry in zip(background(images).tolist(), wanted, strict=True)]
    object_found = predictions(nets.load("object"), images)
    figures = {
        "background_accuracy": share(right),
        "object_accuracy": share([label == entry.name for label, entry in zip(object_found, wanted, strict=True)]),
    }
    for colour in table:
        own = [ok for ok, entry in zip(right, wanted, strict=True) if entry.colour == colour]
        if own:
            figures[f"background_accuracy_{colour}"] = share(own)
    return figures


def on_compositions(pipeline: Any, data: Path, count: int = 1000) -> dict[str, float]:
    """Return figures on fresh compositions of the sprites: autoencoder PSNR and the critics' own accuracy."""
    sprites = load_sprites(data)
    generator = torch.Generator().manual_seed(4242)
    batch = compose(sprites, balanced_indices(sprites, count, generator), generator)
    images = batch.images / 2 + 0.5
    with torch.no_grad():
        decoded = [
            pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
            for part in torch.split(batch.images, 50)
        ]
    rebuilt = torch.cat(decoded) / 2 + 0.5
    error = (rebuilt - images).square().mean((1, 2, 3))
    truth = [sprites.names[i] for i in batch.name_id.tolist()]
    style = [STYLES[i] for i in batch.true_style.tolist()]
    trained = [i for i, name in enumerate(truth) if name in TRAINING]
    figures = {
        "vae_psnr_db": round(float(-10 * error.mean().log10()), 2),
        "vae_psnr_db_mean_over_pictures": round(float((-10 * error.log10()).mean()), 2),
    }
    for kind, shown in (("", images), ("_after_vae", rebuilt)):
        found = predictions(nets.load("object"), shown)
        figures[f"object_accuracy{kind}"] = share([a == b for a, b in zip(found, truth, strict=True)])
        figures[f"object_accuracy_training_animals{kind}"] = share([found[i] == truth[i] for i in trained])
        found = predictions(nets.load("style3d"), shown)
        figures[f"style_accuracy{kind}"] = share([a == b for a, b in zip(found, style, strict=True)])
    figures["background_accuracy"] = share((background(images) == batch.true_colour).tolist())
    return figures


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write pictures (N, 3, H, W) in [0, 1] as one PNG, `columns` in a row."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(rows * columns, channels, height, width)
    sheet[:count] = images
    sheet = sheet.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = (sheet.reshape(rows * height, columns * width, channels).clamp(0, 1) * 255).round()
    Image.fromarray(pixels.numpy().astype(np.uint8)).save(path)


def report(result: dict[str, Any]) -> str:
    """Return the figures as a markdown table with the worst animals below."""
    lines = ["| figure | value |", "|---|---|"]
    for part, figures in result.items():
        for key, value in figures.items():
            if isinstance(value, int | float):
                lines.append(f"| {part}: {key.replace('_', ' ')} | {value:g} |")
    lines.append("")
    for part in ("training", "held_out"):
        worst = result[part]["worst"].items()
        text = ", ".join(f"{name} {entry['accuracy']:g} (taken for {entry['taken_for']})" for name, entry in worst)
        lines.append(f"Worst of the {part.replace('_', '-')} animals: {text}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the embedded generator and write `evaluation.json`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER / "pipeline", help="directory of the pipeline")
    parser.add_argument("--data", type=Path, help="folder with google, twitter, fluent")
    parser.add_argument("--latents", type=int, default=4, help="pictures of each animal")
    parser.add_argument("--animals", type=int, help="only so many animals of each split, for a trial")
    parser.add_argument("--out", type=Path, default=FOLDER / "evaluation.json", help="file to write")
    parser.add_argument("--grid", type=Path, help="write two pictures of each animal to this PNG")
    options = parser.parse_args(arguments)
    sampler, began = Sampler(), time.monotonic()
    pipeline = load_pipeline(options.model, sampler)
    training, held_out = TRAINING[: options.animals], HELD_OUT[: options.animals]
    result: dict[str, Any] = {
        "weights": {part: sha256(next((options.model / part).glob("*.safetensors"))) for part in ("unet", "vae")},
        "sampler": {"steps": sampler.steps, "guidance": sampler.guidance, "spacing": sampler.spacing, "eta": 0.0},
    }
    if options.data is not None:
        result["compositions"] = on_compositions(pipeline, options.data)
    result["training"], images, _ = objects(pipeline, training, options.latents, sampler)
    result["held_out"], others, _ = objects(pipeline, held_out, options.latents, sampler)
    result["styles"] = styles(pipeline, (*training, *held_out), max(options.latents // 4, 1), sampler)
    result["backgrounds"] = backgrounds(pipeline, (*training, *held_out), max(options.latents // 2, 1), sampler)
    if options.grid is not None:
        every = torch.cat([images, others]).view(-1, options.latents, *images.shape[1:])[:, :2]
        write_grid(every.flatten(0, 1), options.grid, columns=12)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(report(result))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
