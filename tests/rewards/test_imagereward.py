"""ImageReward: the published layout, a second network in double precision, odd pictures and prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.api import UserError
from harness.prompts import Prompt
from rewards.imagereward import ImageReward

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL: dict[str, Any] = {
    "vision": {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "text": {
        "vocab_size": 30,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 50,
    },
    "mlp": [9, 8, 7, 6],
}
LARGE: dict[str, Any] = {
    "vision": {"image_size": 224, "patch_size": 16, "hidden_size": 1024, "intermediate_size": 4096}
    | {"num_hidden_layers": 24, "num_attention_heads": 16},
    "text": {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    | {"num_attention_heads": 12, "max_position_embeddings": 512},
    "mlp": [1024, 128, 64, 16],
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "cat", "on", "##es", "grass", ",", "cafe"]
CONFIG = ImageReward.Config()


def layout(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `ImageReward.pt`."""
    vision, text, mlp = config["vision"], config["text"], config["mlp"]
    width, inner, size = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    eye = "blip.visual_encoder"
    shapes[f"{eye}.cls_token"] = (1, 1, width)
    shapes[f"{eye}.pos_embed"] = (1, 1 + (vision["image_size"] // size) ** 2, width)
    shapes |= {f"{eye}.patch_embed.proj.weight": (width, 3, size, size), f"{eye}.patch_embed.proj.bias": (width,)}
    for i in range(vision["num_hidden_layers"]):
        norm(f"{eye}.blocks.{i}.norm1", width)
        linear(f"{eye}.blocks.{i}.attn.qkv", width, 3 * width)
        linear(f"{eye}.blocks.{i}.attn.proj", width, width)
        norm(f"{eye}.blocks.{i}.norm2", width)
        linear(f"{eye}.blocks.{i}.mlp.fc1", width, inner)
        linear(f"{eye}.blocks.{i}.mlp.fc2", inner, width)
    norm(f"{eye}.norm", width)
    reader, hidden = "blip.text_encoder", text["hidden_size"]
    shapes[f"{reader}.embeddings.position_ids"] = (1, text["max_position_embeddings"])
    shapes[f"{reader}.embeddings.word_embeddings.weight"] = (text["vocab_size"], hidden)
    shapes[f"{reader}.embeddings.position_embeddings.weight"] = (text["max_position_embeddings"], hidden)
    norm(f"{reader}.embeddings.LayerNorm", hidden)
    for i in range(text["num_hidden_layers"]):
        layer = f"{reader}.encoder.layer.{i}"
        for kind, source in (("attention", hidden), ("crossattention", width)):
            linear(f"{layer}.{kind}.self.query", hidden, hidden)
            linear(f"{layer}.{kind}.self.key", source, hidden)
            linear(f"{layer}.{kind}.self.value", source, hidden)
            linear(f"{layer}.{kind}.output.dense", hidden, hidden)
            norm(f"{layer}.{kind}.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", hidden, text["intermediate_size"])
        linear(f"{layer}.output.dense", text["intermediate_size"], hidden)
        norm(f"{layer}.output.LayerNorm", hidden)
    linear("blip.vision_proj", width, 256)
    linear("blip.text_proj", hidden, 256)
    for place, inputs, outputs in zip((0, 2, 4, 6, 7), [hidden, *mlp], [*mlp, 1], strict=True):
        linear(f"mlp.layers.{place}", inputs, outputs)
    return shapes


def random_state() -> dict[str, Tensor]:
    """Random weights of the small size under the published names, large enough that every part matters."""
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.7 * torch.randn(shape, generator=generator) for name, shape in layout(SMALL).items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(50)[None]
    return state


def write(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = SMALL) -> dict[str, Path]:
    """The three files."""
    torch.save(dict(state), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint."""
    return write(tmp_path_factory.mktemp("small"), random_state())


@pytest.fixture(scope="module")
def reward(files: dict[str, Path]) -> ImageReward:
    """The reward in single precision; building it draws nothing from torch's global generator."""
    before = torch.get_rng_state()
    made = ImageReward(CPU, CONFIG, files)
    assert torch.equal(before, torch.get_rng_state())
    return made


@pytest.fixture(scope="module")
def exact(files: dict[str, Path]) -> ImageReward:
    """The reward in double precision."""
    return ImageReward(CPU, CONFIG, files, torch.float64)


def noise(*shape: int) -> Tensor:
    """Double-precision pictures."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(d)) v by head, of (tokens, width)."""
    parts = []
    for q, k, v in zip(query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True):
        parts.append((q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v)
    return torch.cat(parts, 1)


def formula(state: Mapping[str, Tensor], pixels: Tensor, ids: list[int]) -> Tensor:
    """The score of one preprocessed picture (3, 32, 32) and its word pieces, in double precision.

    There is no padding here: what is masked must change nothing.
    """
    weights = {name: value.double() for name, value in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: Tensor, epsilon: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    eye = "blip.visual_encoder"
    kernel = weights[f"{eye}.patch_embed.proj.weight"].flatten(1)
    patches = torch.stack(
        [kernel @ pixels[:, y : y + 8, x : x + 8].flatten() for y in range(0, 32, 8) for x in range(0, 32, 8)]
    )
    patches = patches + weights[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([weights[f"{eye}.cls_token"][0], patches]) + weights[f"{eye}.pos_embed"][0]
    for i in range(2):
        block = f"{eye}.blocks.{i}"
        query, key, value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, 1)
        x = x + linear(f"{block}.attn.proj", attend(query, key, value, 4))
        x = x + linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{eye}.norm", x, 1e-6)

    reader = "blip.text_encoder"
    h = weights[f"{reader}.embeddings.word_embeddings.weight"][ids]
    h = h + weights[f"{reader}.embeddings.position_embeddings.weight"][: len(ids)]
    h = norm(f"{reader}.embeddings.LayerNorm", h, 1e-12)
    for i in range(3):
        layer = f"{reader}.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            source = h if kind == "attention" else seen
            query = linear(f"{layer}.{kind}.self.query", h)
            key, value = linear(f"{layer}.{kind}.self.key", source), linear(f"{layer}.{kind}.self.value", source)
            mixed = linear(f"{layer}.{kind}.output.dense", attend(query, key, value, 3))
            h = norm(f"{layer}.{kind}.output.LayerNorm", mixed + h, 1e-12)
        wide = gelu(linear(f"{layer}.intermediate.dense", h))
        h = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", wide) + h, 1e-12)
    out = h[0]
    for place in (0, 2, 4, 6, 7):
        out = linear(f"mlp.layers.{place}", out)
    return (out[0] - 0.16717362830052426) / 1.0333394966054072


PAIRS = [("a red fox", [2, 5, 6, 7, 3]), ("", [2, 3]), ("Foxes, on the GRASS", [2, 7, 10, 12, 9, 1, 11, 3])]


def test_scores_are_those_of_the_formula(reward: ImageReward, exact: ImageReward) -> None:
    """Both encoders, the head, the constants and the word pieces, for prompts of different lengths in one batch."""
    pictures = noise(3, 3, 32, 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
    expected = torch.stack(
        [formula(random_state(), (p - mean) / std, ids) for p, (_, ids) in zip(pictures, PAIRS, strict=True)]
    )
    assert expected.std() > 0.1
    prompts = [Prompt(str(i), text) for i, (text, _) in enumerate(PAIRS)]
    torch.testing.assert_close(exact(pictures, prompts), expected, rtol=0, atol=1e-9)
    scores = reward(pictures.float(), prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=5e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 80), (100, 32), (20, 20), (33, 47)])
def test_pictures_are_resized_as_by_pillow(reward: ImageReward, shape: tuple[int, int]) -> None:
    """Shorter side to 32 by Pillow's bicubic on floats, middle square: the score of what it makes is the same."""
    picture = noise(1, 3, *shape).float()
    height, width = shape
    size = (int(32 * height / min(shape)), int(32 * width / min(shape)))
    channels = [Image.fromarray(c.numpy()).resize(size[::-1], Image.Resampling.BICUBIC) for c in picture[0]]
    resized = torch.from_numpy(np.stack([np.asarray(c) for c in channels]))[None]
    top, left = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
    prompt = [Prompt("p", "a cat")]
    expected = reward(resized[:, :, top : top + 32, left : left + 32], prompt)
    torch.testing.assert_close(reward(picture, prompt), expected, rtol=0, atol=2e-4)


def test_the_gradient_is_that_of_finite_differences(exact: ImageReward) -> None:
    """From the score to the pixels, through resizing and both encoders, in double precision."""
    pictures = noise(2, 3, 40, 52).requires_grad_(True)
    prompts = [Prompt("p", "a red fox"), Prompt("q", "cat on grass")]
    (gradient,) = torch.autograd.grad(exact(pictures, prompts).sum(), pictures)
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        rise = exact(pictures + 1e-5 * direction, prompts) - exact(pictures - 1e-5 * direction, prompts)
    assert float((gradient * direction).sum()) == pytest.approx(float(rise.sum()) / 2e-5, rel=1e-6)
    assert (gradient.flatten(1).norm(dim=1) > 1e-3).all()


def test_a_score_depends_on_its_own_picture_and_prompt(reward: ImageReward) -> None:
    """In any order and company; and on both."""
    pictures, prompts = noise(3, 3, 32, 40).float(), [Prompt(text, text) for text in ("a fox", "cat", "red red cat")]
    scores = reward(pictures, prompts)
    torch.testing.assert_close(reward(pictures.flip(0), prompts[::-1]).flip(0), scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(reward(pictures[1:2], prompts[1:2]), scores[1:2], rtol=0, atol=1e-5)
    assert (reward(pictures, prompts[1:] + prompts[:1]) - scores).abs().min() > 1e-3
    assert (reward(pictures.flip(2), prompts) - scores).abs().min() > 1e-3


def test_a_prompt_is_cut_at_35_tokens_and_read_once(reward: ImageReward, monkeypatch: pytest.MonkeyPatch) -> None:
    """[CLS], 33 word pieces and [SEP]; the same text is not tokenised a second time."""
    picture = noise(1, 3, 32, 32).float()
    cut, long = (reward(picture, [Prompt("p", " ".join(["red fox"] * n + ["red"]))]) for n in (16, 200))
    shorter = reward(picture, [Prompt("p", " ".join(["red fox"] * 16))])
    assert torch.equal(cut, long)
    assert not torch.equal(cut, shorter)
    monkeypatch.setattr(reward, "_tokenizer", None)
    assert torch.equal(reward(picture, [Prompt("another", " ".join(["red fox"] * 200 + ["red"]))]), long)


@pytest.mark.parametrize("text", ["", " \n", "Café", "狐 \U0001f98a", "[SEP]", "a\x00b"])
def test_any_text_has_a_score(reward: ImageReward, text: str) -> None:
    """Accents fall away, unknown words are one token."""
    assert reward(noise(1, 3, 32, 32).float(), [Prompt("p", text)]).isfinite().all()


def test_accents_and_case_do_not_matter(reward: ImageReward) -> None:
    """As in bert-base-uncased."""
    picture = noise(1, 3, 32, 32).float()
    scores = [reward(picture, [Prompt("p", text)]) for text in ("CAFÉ", "cafe", "cat")]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_picture_scores_nan_and_leaves_the_others_alone(reward: ImageReward, value: float) -> None:
    """Also where the broken pixel is cut away."""
    pictures, prompts = noise(3, 3, 32, 90).float(), [Prompt("p", "a fox")] * 3
    whole = reward(pictures, prompts)
    pictures[1, 0, 3, 0] = value
    scores = reward(pictures, prompts)
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[[0, 2]], whole[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 4, 32, 32), (3, 32, 32)])
def test_other_than_three_channels_are_refused(reward: ImageReward, shape: tuple[int, ...]) -> None:
    """Grey pictures, transparency, and a picture without its batch."""
    with pytest.raises(ValueError, match="floating point"):
        reward(noise(*shape), [Prompt("p", "a fox")])


def test_a_prompt_too_few_is_refused(reward: ImageReward) -> None:
    """Instead of a shifted score."""
    with pytest.raises(ValueError, match="2 pictures, but 1 prompts"):
        reward(noise(2, 3, 32, 32), [Prompt("p", "a fox")])


def test_bfloat16_is_an_option(reward: ImageReward, files: dict[str, Path]) -> None:
    """The encoders compute in it; the head stays in single precision, and so does the score."""
    fast = ImageReward(CPU, CONFIG, files, torch.bfloat16)
    assert fast._network.mlp[0].weight.dtype == torch.float32
    assert fast._network.vision.embeddings.patch_embedding.weight.dtype == torch.bfloat16
    pictures, prompts = noise(3, 3, 32, 32).float().requires_grad_(True), [Prompt("p", "a fox")] * 3
    scores = fast(pictures, prompts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(pictures, prompts), rtol=0.05, atol=0.05)
    assert torch.autograd.grad(scores.sum(), pictures)[0].isfinite().all()


def test_the_published_layout_is_accepted_whole(tmp_path: Path) -> None:
    """625 tensors and 446.7 million parameters; on the meta device, from a file of one number each."""
    shapes = layout(LARGE)
    assert len(shapes) == 625
    learnt = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "position_ids" not in name)
    assert learnt == pytest.approx(446.7e6, rel=1e-3)
    files = write(tmp_path, {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, config=None)
    assert files["ImageReward.pt"].stat().st_size < 1e6
    ImageReward(META, CONFIG, files)
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items() if "blocks.23.norm1" not in name}
    with pytest.raises(UserError, match=r"lacks vision\.encoder\.layers\.23\.layer_norm1\.weight \(1024,\)"):
        ImageReward(META, CONFIG, write(tmp_path, state, config=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blip.text_encoder.encoder.layer.0.crossattention.self.key.bias"), r"lacks text\.enc"),
        (
            lambda state: state.update({"blip.itm_head.weight": torch.zeros(2, 12)}),
            r"has besides blip\.itm_head\.weight",
        ),
        (lambda state: state.update({"mlp.layers.7.bias": torch.zeros(2)}), r"mlp\.7\.bias \(2,\) instead of \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    """A key too few or too many, and another shape, on the meta device and elsewhere."""
    state = random_state()
    change(state)
    files = write(tmp_path, state)
    for device in (META, CPU):
        with pytest.raises(UserError, match=message):
            ImageReward(device, CONFIG, files)


@pytest.mark.parametrize(
    ("part", "value"),
    [("mlp", [8, 8]), ("vision", {"hidden_size": 16}), ("text", {**SMALL["text"], "max_position_embeddings": 20})],
)
def test_another_architecture_needs_every_part(tmp_path: Path, part: str, value: Any) -> None:
    """A config.json of another form says what is expected."""
    files = write(tmp_path, random_state(), {**SMALL, part: value})
    with pytest.raises(UserError, match=r"config\.json is no architecture of ImageReward"):
        ImageReward(META, CONFIG, files)


def test_another_vocabulary_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """One that lacks BERT's marks, or has more words than the network."""
    path = tmp_path / "vocab.txt"
    for content, message in (("a\nb\n", r"lacks \[CLS\]"), ("\n".join([*WORDS, *map(str, range(99))]), "113 lines")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            ImageReward(META, CONFIG, {**files, "vocab.txt": path})


def test_unused_tensors_may_be_missing(files: dict[str, Path], reward: ImageReward, tmp_path: Path) -> None:
    """BLIP's projections play no part in the score."""
    unused = ("blip.vision_proj", "blip.text_proj", "blip.text_encoder.embeddings.position_ids")
    state = {name: value for name, value in random_state().items() if not name.startswith(unused)}
    picture, prompt = noise(1, 3, 32, 32).float(), [Prompt("p", "a fox")]
    assert torch.equal(ImageReward(CPU, CONFIG, write(tmp_path, state))(picture, prompt), reward(picture, prompt))
