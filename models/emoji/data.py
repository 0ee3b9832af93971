"""The pictures that the embedded generator learns from: emoji sprites composed onto coloured backgrounds.

Three npm packages, unpacked side by side into one folder, hold the same emoji in three styles:
`google/` (emoji-datasource-google, Noto) is "flat", `twitter/` (emoji-datasource-twitter, Twemoji) is
"simple", `fluent/` (@lobehub/fluent-emoji-3d) is "3d". Nothing here downloads anything.

Everything that depends on chance takes a `torch.Generator`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

SIZE = 64
STYLES = ("flat", "simple", "3d")
PACKAGES = {"flat": "google", "simple": "twitter", "3d": "fluent"}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 132, 28),
    "yellow": (250, 218, 62),
    "green": (58, 164, 72),
    "cyan": (70, 204, 216),
    "blue": (44, 88, 212),
    "purple": (128, 58, 178),
    "pink": (248, 152, 194),
    "brown": (124, 80, 46),
    "grey": (132, 132, 132),
    "black": (22, 22, 22),
    "white": (244, 244, 244),
}
# Filed among the animals by Unicode, but no animal: a caption "a feather" would only blur the vocabulary.
NOT_ANIMALS = frozenset({"paw prints", "pig nose", "feather", "wing", "spiral shell", "coral", "spider web", "microbe"})
# Vowel letters that sound like a consonant ("yoo-nicorn").
A_BEFORE_VOWEL = frozenset({"unicorn"})
VOCABULARY = Path(__file__).parent / "vocabulary.json"


@dataclass(frozen=True)
class Sprites:
    """All sprites, one row each; rows of equal `name_id` show the same kind of thing.

    Attributes:
        pixels: uint8 (N, 4, 64, 64), RGBA with straight (not premultiplied) alpha, 0..255.
        name_id: int64 (N,), index into `names`.
        style_id: int64 (N,), index into `STYLES`.
        names: the vocabulary, in Unicode's order.
        categories: Unicode's subcategory of each name, such as "animal-mammal".
    """

    pixels: Tensor
    name_id: Tensor
    style_id: Tensor
    names: tuple[str, ...]
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return int(self.pixels.shape[0])


@dataclass(frozen=True)
class Jitter:
    """How freely a sprite is placed.

    Attributes:
        scale: range of the sprite's size as a fraction of the picture's.
        shift: greatest shift in x and in y, in pixels.
        flip: probability of a mirror image.
        shade: greatest change of the background colour as a whole, in [-1, 1] units per channel.
        grade: greatest difference between the background's middle and its edge, in [-1, 1] units.
        name_style: probability that the caption names the style.
        name_colour: probability that the caption names the background colour.
    """

    scale: tuple[float, float] = (0.82, 0.94)
    shift: float = 3.0
    flip: float = 0.5
    shade: float = 0.03
    grade: float = 0.08
    name_style: float = 0.5
    name_colour: float = 0.5


@dataclass(frozen=True)
class Batch:
    """Composed pictures with what is known about them.

    Attributes:
        images: float32 (B, 3, 64, 64) in [-1, 1].
        captions: B captions.
        name_id: int64 (B,).
        style_id: int64 (B,), -1 where the caption does not name the style.
        colour_id: int64 (B,), -1 where the caption does not name the colour.
        true_style: int64 (B,), the style whether named or not.
        true_colour: int64 (B,), the colour whether named or not.
    """

    images: Tensor
    captions: list[str]
    name_id: Tensor
    style_id: Tensor
    colour_id: Tensor
    true_style: Tensor
    true_colour: Tensor


def clean_name(name: str) -> str:
    """Return the everyday name: lower case, without "face" and "front-facing"."""
    words = [word for word in name.lower().split() if word not in {"face", "front-facing"}]
    return " ".join(words)


def article(phrase: str) -> str:
    """Return "a" or "an" for the phrase: "an" before a vowel letter, but "a unicorn"."""
    first = phrase.split()[0]
    return "an" if first[0] in "aeiou" and first not in A_BEFORE_VOWEL else "a"


def caption(name: str, style: str | None = None, colour: str | None = None) -> str:
    """Return `a [style] name [on a colour background]`, with "a"/"an" as `article` says."""
    thing = name if style is None else f"{style} {name}"
    text = f"{article(thing)} {thing}"
    return text if colour is None else f"{text} on {article(colour)} {colour} background"


def read_rgba(path: Path) -> Tensor:
    """Read a picture as uint8 (4, 64, 64) RGBA; larger ones are reduced with antialiasing.

    The reduction works on premultiplied alpha, so that the invisible colour of transparent pixels does
    not leak into the edge.
    """
    with Image.open(path) as opened:
        rgba = np.asarray(opened.convert("RGBA"), dtype=np.float32) / 255.0
    pixels = torch.from_numpy(rgba).permute(2, 0, 1)
    if pixels.shape[-2:] != (SIZE, SIZE):
        alpha = pixels[3:]
        both = torch.cat([pixels[:3] * alpha, alpha])[None]
        both = F.interpolate(both, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]
        alpha = both[3:]
        pixels = torch.cat([both[:3] / alpha.clamp_min(1e-4), alpha])
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def sprite_path(data_dir: Path, style: str, entry: dict[str, Any]) -> Path | None:
    """Return the file of one emoji in one style, or None where the style lacks it."""
    if style == "3d":
        # The packages disagree on whether the variation selector FE0F belongs to the name.
        full = str(entry["unified"]).lower()
        for stem in (full, full.replace("-fe0f", "")):
            path = data_dir / "fluent" / "assets" / f"{stem}.webp"
            if path.exists():
                return path
        return None
    package = PACKAGES[style]
    path = data_dir / package / "img" / package / "64" / str(entry["image"])
    return path if path.exists() else None


def load_sprites(data_dir: Path) -> Sprites:
    """Read the animals of all three packages under `data_dir` (`google`, `twitter`, `fluent`)."""
    text = (data_dir / "google" / "emoji_pretty.json").read_text(encoding="utf-8")
    entries: list[dict[str, Any]] = sorted(json.loads(text), key=lambda entry: int(entry["sort_order"]))
    names: dict[str, str] = {}
    pixels: list[Tensor] = []
    name_of: list[str] = []
    style_of: list[int] = []
    for entry in entries:
        category = str(entry["subcategory"])
        name = clean_name(str(entry["name"]))
        if not category.startswith("animal-") or name in NOT_ANIMALS:
            continue
        names.setdefault(name, category)
        for style_id, style in enumerate(STYLES):
            path = sprite_path(data_dir, style, entry)
            if path is not None:
                pixels.append(read_rgba(path))
                name_of.append(name)
                style_of.append(style_id)
    if not pixels:
        raise FileNotFoundError(f"no sprites under {data_dir}: unpack the three npm packages there")
    index = {name: i for i, name in enumerate(names)}
    return Sprites(
        torch.stack(pixels),
        torch.tensor([index[name] for name in name_of]),
        torch.tensor(style_of),
        tuple(names),
        tuple(names.values()),
    )


def balanced_indices(sprites: Sprites, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` rows, int64 (count,): every name, then every style of it, equally likely."""
    cell = sprites.name_id * len(STYLES) + sprites.style_id
    in_cell = torch.bincount(cell, minlength=len(sprites.names) * len(STYLES))
    styles_of_name = (in_cell.view(-1, len(STYLES)) > 0).sum(1)
    weight = 1.0 / (in_cell[cell] * styles_of_name[sprites.name_id]).double()
    return torch.multinomial(weight, count, replacement=True, generator=generator)


def background(colour_id: Tensor, jitter: Jitter, generator: torch.Generator) -> Tensor:
    """Return graded backgrounds, float32 (B, 3, 64, 64) in [-1, 1], of the colours int64 (B,)."""
    count = len(colour_id)
    table = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1
    base = table[colour_id] + (torch.rand(count, 3, generator=generator) * 2 - 1) * jitter.shade
    angle = torch.rand(count, 1, 1, generator=generator) * (2 * torch.pi)
    strength = torch.rand(count, 1, 1, generator=generator) * jitter.grade
    axis = torch.linspace(-1, 1, SIZE)
    slope = strength * (torch.cos(angle) * axis[None, None, :] + torch.sin(angle) * axis[None, :, None])
    return base[:, :, None, None] + slope[:, None]


def compose(sprites: Sprites, indices: Tensor, generator: torch.Generator, jitter: Jitter | None = None) -> Batch:
    """Compose one picture per index: a sprite on a coloured background, with its caption.

    Args:
        sprites: what to draw.
        indices: int64 (B,), rows of `sprites`.
        generator: source of placement, colours and captions (on the CPU).
        jitter: how freely; the defaults of `Jitter` where None.

    Returns:
        The batch; images are float32 (B, 3, 64, 64) in [-1, 1].
    """
    jitter = jitter or Jitter()
    count = len(indices)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    rgba = sprites.pixels[indices].float() / 255.0
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    scale = uniform(*jitter.scale)
    mirror = torch.where(uniform(0, 1) < jitter.flip, -1.0, 1.0)
    limit = jitter.shift * 2 / SIZE
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = mirror / scale
    theta[:, 1, 1] = 1 / scale
    theta[:, 0, 2] = uniform(-limit, limit) / scale
    theta[:, 1, 2] = uniform(-limit, limit) / scale
    grid = F.affine_grid(theta, [count, 4, SIZE, SIZE], align_corners=False)
    placed = F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    colour_id = torch.randint(len(COLOURS), (count,), generator=generator)
    behind = background(colour_id, jitter, generator)
    alpha = placed[:, 3:]
    images = (placed[:, :3] * 2 - alpha + behind * (1 - alpha)).clamp(-1, 1)

    name_id, style_id = sprites.name_id[indices], sprites.style_id[indices]
    said_style = torch.where(uniform(0, 1) < jitter.name_style, style_id, -1)
    said_colour = torch.where(uniform(0, 1) < jitter.name_colour, colour_id, -1)
    captions = caption_batch(sprites.names, name_id, said_style, said_colour)
    return Batch(images, captions, name_id, said_style, said_colour, style_id, colour_id)


def caption_batch(names: Sequence[str], name_id: Tensor, style_id: Tensor, colour_id: Tensor) -> list[str]:
    """Return the captions of int64 (B,) ids, where -1 leaves style or colour unsaid."""
    colours = list(COLOURS)
    rows = zip(name_id.tolist(), style_id.tolist(), colour_id.tolist(), strict=True)
    return [caption(names[n], STYLES[s] if s >= 0 else None, colours[c] if c >= 0 else None) for n, s, c in rows]


def vocabulary(sprites: Sprites) -> dict[str, Any]:
    """Return what rewards and prompt suites need to know: names, styles, colours (as JSON)."""
    counts = torch.bincount(
        sprites.name_id * len(STYLES) + sprites.style_id, minlength=len(sprites.names) * len(STYLES)
    )
    table = counts.view(-1, len(STYLES)).tolist()
    return {
        "template": "a [style] name [on a colour background]",
        "styles": list(STYLES),
        "colours": {name: list(rgb) for name, rgb in COLOURS.items()},
        "names": [
            {
                "name": name,
                "animal": True,
                "category": category,
                "article": article(name),
                "sprites": dict(zip(STYLES, row, strict=True)),
            }
            for name, category, row in zip(sprites.names, sprites.categories, table, strict=True)
        ],
    }


def main() -> None:
    """Write `vocabulary.json` from the unpacked packages."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with google, twitter, fluent")
    sprites = load_sprites(parser.parse_args().data)
    # One name a line: readable, and a change shows as one line of a diff.
    described = vocabulary(sprites)
    rows = ",\n".join("    " + json.dumps(row) for row in described.pop("names"))
    head = json.dumps(described, indent=2)[:-2]
    VOCABULARY.write_text(f'{head},\n  "names": [\n{rows}\n  ]\n}}\n', encoding="utf-8")
    print(f"{len(sprites.names)} names, {len(sprites)} sprites")


if __name__ == "__main__":
    main()
