"""Objects by OWL-ViT: against transformers' own processor and forward pass, on random weights of reduced size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor

from harness.api import UserError
from harness.prompts import Prompt
from harness.reward_sources import find_reward
from rewards.object import Object

CPU, META = torch.device("cpu"), torch.device("meta")
SETTINGS = Object.Config(add="hat, red fox", remove="dog")
QUESTIONS = ["a photo of a hat", "a photo of a red fox", "a photo of a dog"]
SMALL: dict[str, Any] = {
    "model_type": "owlvit",
    "text_config": {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "max_position_embeddings": 32, "eos_token_id": 59, "bos_token_id": 58},
    "vision_config": {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    | {"image_size": 64, "patch_size": 16},
    "projection_dim": 16,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def network() -> OwlViTForObjectDetection:
    """Random weights, large enough that scores differ."""
    with torch.random.fork_rng(devices=[]):
        made = OwlViTForObjectDetection(OwlViTConfig(**SMALL)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = 0.8 * torch.randn(parameter.shape, generator=generator)
    return made


def write(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = SMALL) -> dict[str, Path]:
    """A directory in the layout of transformers; the tokenizer knows single letters."""
    words = ["!", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": 58, "<|endoftext|>": 59}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    torch.save(dict(state), folder / "pytorch_model.bin")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small checkpoint, with the position indices that old versions stored."""
    state = dict(network().state_dict())
    state["owlvit.text_model.embeddings.position_ids"] = torch.arange(32)[None]
    state["owlvit.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    return write(tmp_path_factory.mktemp("owl"), state)


@pytest.fixture(scope="module")
def reward(files: dict[str, Path]) -> Object:
    """Two objects to add and one to remove; building it draws nothing from torch's global generator."""
    before = torch.get_rng_state()
    made = Object(CPU, SETTINGS, files)
    assert torch.equal(before, torch.get_rng_state())
    return made


def noise(*shape: int) -> Tensor:
    """Pictures of 8 bits, smooth enough to survive resizing."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((shape[0], shape[1], 9, 9), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic").clamp(0, 1)
    return (fine * 255).round() / 255


def prompts(count: int) -> list[Prompt]:
    """Which are not read."""
    return [Prompt("p", "a fox")] * count


def expected(files: dict[str, Path], pixels: Tensor) -> Tensor:
    """Probabilities of every box for every question (B, boxes, 3), by the library's own forward pass."""
    tokenizer = CLIPTokenizer.from_pretrained(files["vocab.json"].parent, pad_token="!", local_files_only=True)
    encoded = tokenizer(QUESTIONS * len(pixels), padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
        found = network()(encoded["input_ids"], pixels, attention_mask=encoded["attention_mask"])
    return found.logits.sigmoid()


@pytest.mark.parametrize("shape", [(64, 64), (200, 150), (48, 90)])
def test_scores_are_those_of_the_library(reward: Object, files: dict[str, Path], shape: tuple[int, int]) -> None:
    """Its processor and its forward pass; the best box of each object, added or subtracted."""
    pictures = noise(3, 3, *shape)
    processor = OwlViTImageProcessor(size={"height": 64, "width": 64})
    arrays = [(255 * picture).round().byte().permute(1, 2, 0).numpy() for picture in pictures]
    pixels = processor([Image.fromarray(array) for array in arrays], return_tensors="pt")["pixel_values"]
    best = expected(files, pixels).amax(1)
    scores = reward(pictures, prompts(3))
    assert scores.dtype == torch.float32
    tolerance = 1e-5 if shape == (64, 64) else 2e-3  # resized ones are rounded to 8 bits there
    torch.testing.assert_close(scores, best[:, 0] + best[:, 1] - best[:, 2], rtol=0, atol=tolerance)
    assert best.std(0).min() > 5 * tolerance


def test_the_gradient_is_that_of_finite_differences(files: dict[str, Path]) -> None:
    """In double precision, through the resizing."""
    exact = Object(CPU, SETTINGS, files, torch.float64)
    pictures = noise(2, 3, 70, 90).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact(pictures, prompts(2)).sum(), pictures)
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        rise = exact(pictures + 1e-6 * direction, prompts(2)) - exact(pictures - 1e-6 * direction, prompts(2))
    assert float((gradient * direction).sum()) == pytest.approx(float(rise.sum()) / 2e-6, rel=1e-5)
    assert (gradient.flatten(1).norm(dim=1) > 1e-4).all()


def test_adding_and_removing_are_opposites(files: dict[str, Path]) -> None:
    """And several objects are summed; a checkpoint in safetensors is read as well."""
    torn = files["pytorch_model.bin"].parent / "model.safetensors"
    save_file(network().state_dict(), torn)
    located = {**files, "pytorch_model.bin": torn}
    pictures = noise(2, 3, 64, 64)
    scores = {
        names: Object(CPU, Object.Config(**names_of(names)), located)(pictures, prompts(2))
        for names in ("add=hat", "remove=hat", "add=dog", "add=hat,remove=dog", "add=hat,dog")
    }
    assert torch.equal(scores["add=hat"], -scores["remove=hat"])
    for total, sign in (("add=hat,dog", 1), ("add=hat,remove=dog", -1)):
        sum_ = scores["add=hat"] + sign * scores["add=dog"]
        torch.testing.assert_close(scores[total], sum_, rtol=0, atol=1e-6)
    assert (scores["add=hat"] - scores["add=dog"]).abs().min() > 1e-5


def names_of(settings: str) -> dict[str, str]:
    """`add=hat,remove=dog` as the command line reads it."""
    return dict(item.split("=") for item in settings.replace(",remove", ";remove").split(";"))


def test_the_command_line_reaches_it(files: dict[str, Path]) -> None:
    """Settings in brackets, weights in a directory; what is missing or unknown is explained."""
    weights = {"object": str(files["config.json"].parent)}
    source = find_reward("object[add=hat,red fox,remove=dog]", weights)
    assert source.config == Object.Config(add="hat,red fox", remove="dog")
    source.check()
    for expression, message in (
        ("object", "name an object"),
        ("object[add=hat,,dog]", "write names of objects"),
        ("object[hide=dog]", "there is no setting"),
    ):
        with pytest.raises(UserError, match=message):
            find_reward(expression, weights)


@pytest.mark.parametrize("settings", [{}, {"add": "hat,"}, {"remove": " "}, {"add": 3}])
def test_an_object_must_be_named(settings: dict[str, Any]) -> None:
    """Nothing at all, or an empty name, is a mistake."""
    with pytest.raises(ValidationError):
        Object.Config(**settings)


def test_a_name_that_is_too_long_is_refused(files: dict[str, Path]) -> None:
    """Cut, it would name another object."""
    with pytest.raises(UserError, match="is too long: with its question 35 tokens, at most 32"):
        Object(META, Object.Config(add="hat, " + 24 * "x"), files)


def test_a_score_depends_on_its_own_picture_only(reward: Object) -> None:
    """Not on its company or prompt; a broken picture scores NaN alone; other than three channels are refused."""
    pictures = noise(3, 3, 64, 80)
    scores = reward(pictures, prompts(3))
    assert scores.std() > 1e-4
    torch.testing.assert_close(reward(pictures[1:2], [Prompt("q", "")]), scores[1:2], rtol=0, atol=1e-6)
    for value in (float("nan"), float("inf")):
        broken = pictures.clone()
        broken[1, 2, 5, 5] = value
        found = reward(broken, prompts(3))
        assert found.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(found[[0, 2]], scores[[0, 2]], rtol=0, atol=1e-6)
    for channels in (1, 4):
        with pytest.raises(ValueError, match="floating point"):
            reward(torch.zeros(1, channels, 64, 64), prompts(1))


def test_bfloat16_is_an_option(reward: Object, files: dict[str, Path]) -> None:
    """The encoder computes in it; similarities and the score are in single precision."""
    fast = Object(CPU, SETTINGS, files, torch.bfloat16)
    assert fast._network.owlvit.vision_model.embeddings.patch_embedding.weight.dtype == torch.bfloat16
    assert fast._network.class_head.dense0.weight.dtype == torch.float32
    scores = fast(noise(2, 3, 64, 64), prompts(2))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(noise(2, 3, 64, 64), prompts(2)), rtol=0, atol=0.1)


def test_the_published_size_is_the_default(tmp_path: Path) -> None:
    """Without a config.json, 153 million parameters are expected: the published file has 613 MB in single precision."""
    with torch.device("meta"):
        made = OwlViTForObjectDetection(OwlViTConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert 4 * sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(613e6, rel=2e-3)
    assert shapes["owlvit.vision_model.embeddings.position_embedding.weight"] == (577, 768)
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    Object(META, Object.Config(add="ax"), write(tmp_path, state, config=None))


def test_what_does_not_fit_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """A tensor too few or too many, another shape; another kind of model; no tokenizer."""
    state = network().state_dict()
    bias = "class_head.dense0.bias"
    for changed, message in (
        ({name: value for name, value in state.items() if name != bias}, r"lacks class_head\.dense0\.bias \(16,\)"),
        ({**state, "more": torch.zeros(2)}, r"has besides more \(2,\)"),
        ({**state, bias: torch.zeros(2)}, r"class_head\.dense0\.bias \(2,\) instead of \(16,\)"),
    ):
        for device in (META, CPU):
            with pytest.raises(UserError, match=message):
                Object(device, SETTINGS, write(tmp_path, changed))
    for config in ({"model_type": "clip"}, {"model_type": "owlvit"}):
        with pytest.raises(UserError, match=r"is no configuration of an OWL-ViT: it needs model_type owlvit"):
            Object(META, SETTINGS, write(tmp_path, state, config))
    for content in ("[]", "{", '{"a": 0}'):
        (tmp_path / "vocab.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="are no tokenizer of CLIP"):
            Object(META, SETTINGS, {**files, "vocab.json": tmp_path / "vocab.json"})
