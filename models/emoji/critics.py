"""Train the critics of the embedded generator: rewards and gold metrics, small networks on 64x64 pictures.

`python -m models.emoji.critics --data DIR [--only NAME]` trains them on compositions of the sprites (see
`data.py`), each with its own seed, architecture and distortions:

- `style3d`, `style3d_heldout`: flat, simple or 3d;
- `clip`, `clip_heldout`: pictures against captions;
- `object`: which of the animals; a gold metric that is never trained on.

Weights go to `critics/NAME/`, figures on fresh compositions to `critics/metrics.json`. A training that is
interrupted goes on from its last checkpoint under `--state`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from models.emoji import _critic_nets as nets
from models.emoji._augmentation import Distortion, distort, uniform
from models.emoji.data import (
    COLOURS,
    STYLES,
    Batch,
    Jitter,
    Sprites,
    balanced_indices,
    caption,
    caption_batch,
    compose,
    load_sprites,
)


@dataclass(frozen=True)
class Recipe:
    """How one critic is trained.

    Attributes:
        seed: of initialisation and data.
        steps: optimiser steps.
        batch: pictures a step.
        rate: greatest learning rate (AdamW; linear warm-up, then cosine to zero).
        decay: weight decay of matrices and kernels.
        jitter: how freely sprites are placed.
        distortion: how strongly the pictures are distorted.
        smoothing: label smoothing of the classifiers.
        fade: share of pictures that are cross-faded with another style of the same animal, with labels to
            match (style classifiers): the log-odds grow gradually, without plateaus.
    """

    seed: int
    steps: int
    batch: int
    rate: float
    decay: float = 0.05
    jitter: Jitter = field(default_factory=lambda: Jitter(scale=(0.75, 1.0), shift=5.0))
    distortion: Distortion = field(default_factory=Distortion)
    smoothing: float = 0.0
    fade: float = 0.0


def recipes() -> dict[str, Recipe]:
    """Return the recipe of every critic, in the order of training."""
    return {
        "style3d": Recipe(seed=11, steps=1000, batch=64, rate=3e-3, smoothing=0.05, fade=0.25),
        "clip": Recipe(seed=12, steps=1000, batch=64, rate=3e-3),
        "object": Recipe(
            seed=13,
            steps=1200,
            batch=64,
            rate=3e-3,
            smoothing=0.1,
            jitter=Jitter(scale=(0.7, 1.0), shift=6.0),
            distortion=Distortion(blur=1.6, shrink=0.4, noise=0.08, colour=0.25, turn=10.0, erase=0.3),
        ),
        "style3d_heldout": Recipe(
            seed=14,
            steps=1000,
            batch=64,
            rate=3e-3,
            smoothing=0.05,
            fade=0.25,
            distortion=Distortion(blur=1.6, noise=0.03, colour=0.25, erase=0.2),
        ),
        "clip_heldout": Recipe(
            seed=15,
            steps=800,
            batch=64,
            rate=3e-3,
            jitter=Jitter(scale=(0.8, 1.0), shift=4.0),
            distortion=Distortion(zoom=0.05, turn=3.0, blur=1.6, jpeg=0.08, noise=0.08, erase=0.2),
        ),
    }


def labels_of(name: str, sprites: Sprites) -> tuple[str, ...]:
    """Return the classes of the classifier `name` in their order; for a CLIP all that captions name."""
    everything = (*sprites.names, *STYLES, *COLOURS)
    return {"style": STYLES, "objec": sprites.names}.get(name[:5], everything)


def grouped_indices(sprites: Sprites, count: int, group: int, generator: torch.Generator) -> Tensor:
    """Draw `count` rows, int64 (count,), in groups that show the same animal (in any style and design)."""
    cell = sprites.name_id * len(STYLES) + sprites.style_id
    rarity = 1.0 / torch.bincount(cell)[cell].double()
    first = balanced_indices(sprites, count // group, generator)
    same = sprites.name_id[first][:, None] == sprites.name_id[None, :]
    return torch.multinomial(same * rarity, group, replacement=True, generator=generator).flatten()


def style_loss(model: nn.Module, sprites: Sprites, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return the loss of one batch for a style classifier, with cross-fades between styles."""
    pairs = grouped_indices(sprites, 2 * recipe.batch, 2, generator).view(-1, 2)
    seed = int(torch.randint(2**62, (), generator=generator))
    # The same draws twice: both sprites at the same place on the same background.
    first, second = (compose(sprites, pairs[:, i], torch.Generator().manual_seed(seed), recipe.jitter) for i in (0, 1))
    mix = uniform(recipe.batch, generator) * (uniform(recipe.batch, generator) < recipe.fade)
    images = torch.lerp(first.images, second.images, mix.view(-1, 1, 1, 1)) / 2 + 0.5
    wanted = torch.lerp(
        F.one_hot(first.true_style, len(STYLES)).float(),
        F.one_hot(second.true_style, len(STYLES)).float(),
        mix[:, None],
    )
    scores = nets.logits(model, distort(images, recipe.distortion, generator))
    return F.cross_entropy(scores, wanted, label_smoothing=recipe.smoothing)


def object_loss(model: nn.Module, sprites: Sprites, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return the loss of one batch for the classifier of animals."""
    batch = compose(sprites, balanced_indices(sprites, recipe.batch, generator), generator, recipe.jitter)
    images = distort(batch.images / 2 + 0.5, recipe.distortion, generator)
    return F.cross_entropy(nets.logits(model, images), batch.name_id, label_smoothing=recipe.smoothing)


def compatible(batch: Batch) -> Tensor:
    """Return bool (B, B): whether caption j is true of picture i."""
    same = batch.name_id[:, None] == batch.name_id[None, :]
    style = (batch.style_id[None, :] < 0) | (batch.style_id[None, :] == batch.true_style[:, None])
    colour = (batch.colour_id[None, :] < 0) | (batch.colour_id[None, :] == batch.true_colour[:, None])
    return same & style & colour


def clip_loss(model: nn.Module, tokenizer: Any, sprites: Sprites, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return the loss of one batch: which caption belongs to the picture, asked in four ways.

    1. Among the captions of the batch, and among its pictures for the caption (symmetric). Captions that
       are true of another picture are no negatives for it. A third of the batches consist of groups of
       four pictures of one animal, so that colours must be told apart.
    2. Among the plain captions of all animals: many more negatives than a small batch holds.
    3. Among the three styles of the right animal, for a third of the pictures: what is learnt last otherwise.
    4. Animal, style and colour read off the picture's embedding by a linear layer that is thrown away
       afterwards: the picture tower learns shapes long before the texts mean anything.
    """
    group = 4 if bool(uniform(1, generator) < 1 / 3) else 1
    rows = grouped_indices(sprites, recipe.batch, group, generator)
    batch = compose(sprites, rows, generator, recipe.jitter)
    clip: Any = model
    embedding = nets.logits(clip.image, distort(batch.images / 2 + 0.5, recipe.distortion, generator))
    pictures = F.normalize(embedding, dim=-1)
    asked = len(rows) // 3
    pairs = [(int(name), style) for name in batch.name_id[:asked] for style in STYLES]
    captions = [
        *batch.captions,
        *(caption(name) for name in sprites.names),
        *(caption(sprites.names[name], style) for name, style in pairs),
    ]
    distinct = {text: i for i, text in enumerate(dict.fromkeys(captions))}
    features = nets.text_features(model, nets.tokenised(tokenizer, list(distinct)))
    place = torch.tensor([distinct[text] for text in captions])
    own_place, name_place, style_place = torch.split(place, [len(rows), len(sprites.names), len(pairs)])
    scores = pictures @ features.T * clip.logit_scale.clamp(max=math.log(50.0)).exp()
    within = scores[:, own_place].masked_fill(compatible(batch) & ~torch.eye(len(rows), dtype=torch.bool), -1e4)
    own = torch.arange(len(rows))
    hints = torch.split(clip.hints(embedding), [len(sprites.names), len(STYLES), len(COLOURS)], 1)
    truths = (batch.name_id, batch.true_style, batch.true_colour)
    return (
        (F.cross_entropy(within, own) + F.cross_entropy(within.T, own)) / 2
        + F.cross_entropy(scores[:, name_place], batch.name_id)
        + 0.5 * F.cross_entropy(scores[:asked].gather(1, style_place.view(asked, -1)), batch.true_style[:asked])
        + sum((F.cross_entropy(hint, truth) for hint, truth in zip(hints, truths, strict=True)), torch.zeros(()))
    )


def rate_at(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: linear warm-up over the first tenth, then cosine to zero."""
    warm = max(recipe.steps // 10, 1)
    if step < warm:
        return recipe.rate * (step + 1) / warm
    return recipe.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(recipe.steps - warm, 1)))


def all_captions(sprites: Sprites) -> list[str]:
    """Return captions in which every name, style and colour occurs: what the tokenizer learns from."""
    names = [caption(name) for name in sprites.names]
    styles = [caption(name, style) for name in sprites.names for style in STYLES]
    return names + styles + [caption(sprites.names[0], None, colour) for colour in COLOURS] * 8


def train(name: str, sprites: Sprites, folder: Path, state: Path, recipe: Recipe, stop: int | None = None) -> nn.Module:
    """Train one critic, or go on with it, write it to `folder`/name and return it in evaluation mode.

    Args:
        name: a key of `recipes()`.
        sprites: what the pictures show.
        folder: where the critics' folders are.
        state: where checkpoints are kept.
        recipe: how it is trained.
        stop: the step to end at, if before the recipe's last.
    """
    is_clip = name.startswith("clip")
    tokens = nets.write_tokenizer(all_captions(sprites), folder / name / "text") if is_clip else 0
    tokenizer = nets.load_tokenizer(folder / name / "text") if is_clip else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = nets.build(name, labels_of(name, sprites), tokens).to(memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.rate,
        betas=(0.9, 0.98),
    )
    path = state / f"{name}.pt"
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["recipe"] == json.dumps(asdict(recipe)):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            start = saved["step"]
    last = recipe.steps if stop is None else min(stop, recipe.steps)
    model.train()
    began, average = time.monotonic(), 0.0
    for step in range(start, last):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        if tokenizer is not None:
            loss = clip_loss(model, tokenizer, sprites, recipe, generator)
        else:
            loss = (object_loss if name == "object" else style_loss)(model, sprites, recipe, generator)
        for settings in optimizer.param_groups:
            settings["lr"] = rate_at(step, recipe)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = float(loss.detach()) if step == start else 0.98 * average + 0.02 * float(loss.detach())
        done = step + 1
        if done % 50 == 0 or done == last:
            pace = (done - start) / (time.monotonic() - began)
            left = (last - done) / pace
            print(f"{name} {done}/{last} loss {average:.3f} {pace:.2f} steps/s, {left:.0f} s left", flush=True)
        if done % 200 == 0 or done == last:
            checkpoint(
                path,
                {
                    "recipe": json.dumps(asdict(recipe)),
                    "step": done,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
            )
    model.eval()
    nets.save(model, folder / name)
    return model.requires_grad_(False)


def checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def measure(name: str, model: nn.Module, sprites: Sprites, folder: Path, count: int = 1200) -> dict[str, float]:
    """Return the critic's figures on `count` fresh compositions, as they are and distorted."""
    generator = torch.Generator().manual_seed(977)
    batch = compose(sprites, balanced_indices(sprites, count, generator), generator)
    images = batch.images / 2 + 0.5
    figures: dict[str, float] = {}
    for kind, shown in (("", images), ("_distorted", distort(images, Distortion(), generator))):
        if name.startswith("clip"):
            tokenizer = nets.load_tokenizer(folder / name / "text")
            found = clip_figures(model, tokenizer, sprites, batch, shown)
        else:
            scores = torch.cat([nets.logits(model, part) for part in torch.split(shown, 100)])
            truth = batch.name_id if name == "object" else batch.true_style
            found = {"accuracy": _share(scores.argmax(1) == truth)}
            if name != "object":
                odds = scores[:, 2] - scores[:, :2].logsumexp(1)
                for i, style in enumerate(STYLES):
                    chosen = odds[truth == i]
                    found |= {f"log_odds_{style}": float(chosen.mean()), f"sd_{style}": float(chosen.std(correction=0))}
        figures |= {key + kind: round(value, 4) for key, value in found.items()}
    return figures


def clip_figures(model: nn.Module, tokenizer: Any, sprites: Sprites, batch: Batch, images: Tensor) -> dict[str, float]:
    """Return a CLIP's retrieval accuracies and its typical scores (100 times the cosine)."""
    pictures = torch.cat([nets.image_features(model, part) for part in torch.split(images, 100)])

    def scores(names: Tensor, styles: Tensor, colours: Tensor) -> Tensor:
        captions = caption_batch(sprites.names, names, styles, colours)
        distinct = list(dict.fromkeys(captions))
        features = nets.text_features(model, nets.tokenised(tokenizer, distinct))
        place = {text: i for i, text in enumerate(distinct)}
        return 100 * (pictures * features[torch.tensor([place[text] for text in captions])]).sum(1)

    none = torch.full_like(batch.name_id, -1)
    name, style, colour = batch.name_id, batch.true_style, batch.true_colour
    by_name = torch.stack([scores(none * 0 + i, none, none) for i in range(len(sprites.names))], 1)
    by_style = torch.stack([scores(name, none * 0 + i, none) for i in range(len(STYLES))], 1)
    by_colour = torch.stack([scores(name, none, none * 0 + i) for i in range(len(COLOURS))], 1)
    right = scores(name, style, colour)
    return {
        "name_accuracy": _share(by_name.argmax(1) == name),
        "style_accuracy": _share(by_style.argmax(1) == style),
        "colour_accuracy": _share(by_colour.argmax(1) == colour),
        "score_right": float(right.mean()),
        "score_right_sd": float(right.std()),
        "score_name_only": float(scores(name, none, none).mean()),
        "score_wrong_name": float(scores((name + 7) % len(sprites.names), style, colour).mean()),
        "score_wrong_style": float(scores(name, (style + 1) % len(STYLES), colour).mean()),
        "score_wrong_colour": float(scores(name, style, (colour + 5) % len(COLOURS)).mean()),
    }


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def note(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Put one critic's figures into `metrics.json`."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = entry
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the critics and write their weights and figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with google, twitter, fluent")
    parser.add_argument("--only", choices=list(recipes()), help="train this critic only")
    parser.add_argument("--out", type=Path, default=nets.FOLDER, help="folder of the weights")
    parser.add_argument("--state", type=Path, default=Path("results/critics"), help="folder of checkpoints")
    parser.add_argument("--stop", type=int, help="end at this step, for a trial")
    options = parser.parse_args(arguments)
    sprites = load_sprites(options.data)
    for name, recipe in recipes().items():
        if options.only not in (None, name):
            continue
        began = time.monotonic()
        train(name, sprites, options.out, options.state, recipe, options.stop)
        model = nets.load(name, options.out)  # what is stored, without what only the training needs
        with torch.no_grad():
            figures = measure(name, model, sprites, options.out)
        entry = {
            "trained": options.stop is None or options.stop >= recipe.steps,
            "class": nets.CLASSES[name],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seed": recipe.seed,
            "steps": recipe.steps,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "figures": figures,
        }
        note(options.out / "metrics.json", name, entry)
        print(name, json.dumps(figures, indent=2), flush=True)


if __name__ == "__main__":
    main()
