"""The critics of the embedded generator: training, the shipped weights, and the rules that `evaluate` uses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.emoji import _critic_nets as nets
from models.emoji import critics, evaluate
from models.emoji._augmentation import Distortion, distort
from models.emoji.data import COLOURS, STYLES, Sprites, compose
from prompts import emoji_animals

NAMES = ("fox", "two-hump camel", "owl", "crab")


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    """Discs of one colour per name and one border per style."""
    axis = torch.linspace(-1, 1, 64)
    radius = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
    pixels = torch.zeros(len(NAMES) * 3, 4, 64, 64)
    for row in range(len(pixels)):
        name, style = divmod(row, 3)
        pixels[row, :3] = torch.tensor([0.3, 0.5, 0.9]).roll(name)[:, None, None] * (radius < 0.9 - 0.2 * style)
        pixels[row, 3] = radius < 0.95
    ids = torch.arange(len(pixels))
    return Sprites((pixels * 255).to(torch.uint8), ids // 3, ids % 3, NAMES, ("animal-mammal",) * len(NAMES))


@pytest.mark.parametrize("name", list(nets.CLASSES))
def test_two_steps_change_the_weights_and_resuming_gives_the_same(name: str, sprites: Sprites, tmp_path: Path) -> None:
    """An interrupted training ends with the same weights as one in one go."""
    recipe = dataclasses.replace(critics.recipes()[name], steps=2, batch=8)
    whole = critics.train(name, sprites, tmp_path / "a", tmp_path / "state-a", recipe)
    critics.train(name, sprites, tmp_path / "b", tmp_path / "state-b", recipe, stop=1)
    untouched = critics.train(name, sprites, tmp_path / "c", tmp_path / "state-c", recipe, stop=0)
    resumed = critics.train(name, sprites, tmp_path / "b", tmp_path / "state-b", recipe)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), untouched.parameters(), strict=True))
    figures = critics.measure(name, whole, sprites, tmp_path / "a", count=8)
    assert all(torch.isfinite(torch.tensor(value)) for value in figures.values())


@pytest.mark.parametrize("name", list(nets.CLASSES))
def test_shipped_critic_loads_and_has_gradients(name: str) -> None:
    """Every shipped critic loads, is small, and passes gradients to each picture."""
    model = nets.load(name)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    if name.startswith("clip"):
        tokens = nets.tokenised(
            nets.load_tokenizer(nets.FOLDER / name / "text"), ["a fox", "a flat owl on a red background"]
        )
        value = (nets.image_features(model, images) * nets.text_features(model, tokens)).sum(1)
    else:
        value = nets.logits(model, images)[:, 0]
    assert value.shape == (2,)
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.abs().amax((1, 2, 3)) > 0).all())
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_200_000


def test_labels_stand_in_the_order_of_the_vocabulary() -> None:
    """Class i is style i or name i of the vocabulary."""
    vocabulary = json.loads((nets.FOLDER.parent / "vocabulary.json").read_text(encoding="utf-8"))
    style: Any = nets.load("style3d").config
    gold: Any = nets.load("object").config
    assert tuple(style.id2label[i] for i in range(3)) == STYLES
    assert [gold.id2label[i] for i in range(len(gold.id2label))] == [row["name"] for row in vocabulary["names"]]


def test_all_critics_are_trained_and_small() -> None:
    """No untrained weights are shipped."""
    metrics = json.loads((nets.FOLDER / "metrics.json").read_text(encoding="utf-8"))
    assert set(metrics) == set(nets.CLASSES)
    assert all(entry["trained"] for entry in metrics.values())
    assert sum(path.stat().st_size for path in nets.FOLDER.rglob("*.safetensors")) <= 11e6


def test_tokenizer_knows_every_word_and_never_fails(tmp_path: Path) -> None:
    """Words of the captions are whole tokens; any other text becomes bytes, never unknown."""
    size = nets.write_tokenizer(["a two-hump camel", "a 3d fox"], tmp_path)
    tokenizer = nets.load_tokenizer(tmp_path)
    assert len(tokenizer) == size
    assert tokenizer.tokenize("a camel") == ["a</w>", "camel</w>"]
    for text in ("a camel", "zyzzyva", "naïve 猫", "", "?!"):
        tokens = tokenizer(text)["input_ids"]
        assert (tokens[0], tokens[-1]) == (size - 2, size - 1)
        assert size - 1 not in tokens[1:-1]


def test_padding_does_not_change_text_features() -> None:
    """A caption's embedding does not depend on its neighbours in the batch."""
    model, tokenizer = nets.load("clip"), nets.load_tokenizer(nets.FOLDER / "clip" / "text")
    alone = nets.text_features(model, nets.tokenised(tokenizer, ["a fox"]))
    beside = nets.text_features(model, nets.tokenised(tokenizer, ["a fox", "a 3d polar bear on a pink background"]))
    torch.testing.assert_close(alone[0], beside[0])


def test_captions_true_of_another_picture_are_no_negatives(sprites: Sprites) -> None:
    """The mask of the contrastive loss agrees with reading the captions."""
    generator = torch.Generator().manual_seed(1)
    batch = compose(sprites, critics.grouped_indices(sprites, 32, 4, generator), generator)
    true_of = critics.compatible(batch)
    assert bool(true_of.diagonal().all())
    assert bool((batch.name_id.view(-1, 4) == batch.name_id.view(-1, 4)[:, :1]).all())
    for i in range(32):
        for j in range(32):
            text = batch.captions[j]
            style, colour = STYLES[int(batch.true_style[i])], list(COLOURS)[int(batch.true_colour[i])]
            right = (
                NAMES[int(batch.name_id[i])] in text
                and (style in text or batch.style_id[j] < 0)
                and (f"{colour} background" in text or batch.colour_id[j] < 0)
            )
            assert bool(true_of[i, j]) == right


def test_distortion_depends_on_the_generator_only() -> None:
    """The same generator state gives the same pictures."""
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    strength = Distortion(erase=0.5)
    first, again, other = (distort(images, strength, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_background_is_read_from_the_border(sprites: Sprites) -> None:
    """The border rule finds the colour that was painted."""
    batch = compose(sprites, torch.arange(12), torch.Generator().manual_seed(5))
    assert torch.equal(evaluate.background(batch.images / 2 + 0.5), batch.true_colour)


def test_evaluated_animals_are_those_of_the_suite() -> None:
    """`evaluate` and the prompt suite name the same animals in the same words."""
    suite = emoji_animals.suite()
    assert tuple(prompt.metadata["object"] for prompt in suite.training) == evaluate.TRAINING
    assert tuple(prompt.metadata["object"] for prompt in suite.held_out) == evaluate.HELD_OUT
    wanted = [evaluate.Wanted(prompt.metadata["object"], 0).prompt for prompt in (*suite.training, *suite.held_out)]
    assert wanted == [prompt.text for prompt in (*suite.training, *suite.held_out)]
