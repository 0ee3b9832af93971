"""Our rewards against the reference packages: the same random weights of the real size, pictures and prompts.

`tox -e parity` runs this. A comparison is either of the whole way from the picture's file to the score, or of the same
pixels: the reference's own square of 224x224, after its 8-bit resizing, which our preprocessing leaves as it is.
Alterations of a constant or of a name show that the tolerances would find them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from harness.api import ConfiguredReward, Prompt
from rewards import _clip, aesthetic, hpsv2, imagereward, pickscore
from rewards._preprocessing import resize_shortest_side_and_crop

CPU = torch.device("cpu")
Deviations = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Case:
    """A reward and what it is compared with.

    Attributes:
        kind: Its class.
        folder: Of its checkpoint, below the prepared directory.
        reference: File of the reference scores, and the entry in it.
        exact: Largest difference on the same pixels.
        whole: Largest difference from the picture's file on.
        reads: Whether its scores depend on the prompt.
    """

    kind: type[ConfiguredReward]
    folder: str
    reference: tuple[str, str]
    exact: float
    whole: float
    reads: bool = True


CASES = {
    # Its reference preprocesses in tensors: there is no 8-bit square to compare on.
    "hpsv2.1": Case(hpsv2.HPSv21, "hpsv2", ("hpsv2", "v2.1"), 1e-6, 1e-6),
    "hpsv2": Case(hpsv2.HPSv2, "hpsv2", ("hpsv2", "v2.0"), 1e-6, 1e-6),
    "pickscore": Case(pickscore.PickScore, "pickscore", ("pickscore", "score"), 1e-4, 2e-2),
    "aesthetic": Case(aesthetic.Aesthetic, "aesthetic", ("aesthetic", "score"), 5e-5, 4e-3, reads=False),
    "imagereward": Case(imagereward.ImageReward, "imagereward", ("imagereward", "score"), 1e-5, 5e-3),
}
SQUARES = ("pickscore", "aesthetic", "imagereward")


class Compared:
    """A reward with its pairs and reference scores."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.case = CASES[name]
        self._directory = directory
        file, entry = self.case.reference
        self.expected: list[float] = json.loads((directory / "reference" / f"{file}.json").read_text())[entry]
        pairs = json.loads((directory / "pictures" / "pairs.json").read_text(encoding="utf-8"))
        self.pairs: list[tuple[str, str]] = [(picture, prompt) for picture, prompt in pairs][: len(self.expected)]
        self.reward = self.built()

    def built(self) -> ConfiguredReward:
        """The reward, loaded as the harness loads it."""
        config = self.case.kind.Config()
        paths = {
            file.name: self._directory / self.case.folder / file.name
            for file in self.case.kind.files(config)
            if not file.optional
        }
        if self.name == "hpsv2":  # both versions have one layout, and the reference reads the same file for both
            paths = dict.fromkeys(paths, self._directory / "hpsv2" / "HPS_v2.1_compressed.pt")
        return self.case.kind(CPU, config, paths)

    def image(self, picture: str, square: bool) -> Tensor:
        """A picture (1, 3, H, W) in [0, 1], or the reference's square of it."""
        folder = self._directory / "reference" / self.case.folder if square else self._directory / "pictures"
        with Image.open(folder / f"{picture}.png") as opened:
            return torch.from_numpy(np.array(opened)).permute(2, 0, 1)[None].float() / 255

    def scores(self, indices: list[int], square: bool, reward: ConfiguredReward | None = None) -> np.ndarray:
        """Our scores of these pairs."""
        with torch.no_grad():
            found = [
                (reward or self.reward)(self.image(picture, square), [Prompt(str(index), prompt, {})]).item()
                for index in indices
                for picture, prompt in [self.pairs[index]]
            ]
        return np.array(found)

    def deviation(self, indices: list[int], square: bool, reward: ConfiguredReward | None = None) -> float:
        """Largest difference from the reference over these pairs."""
        expected = np.array(self.expected)[indices]
        return float(np.abs(self.scores(indices, square, reward) - expected).max())


@pytest.fixture(scope="module")
def compared(request: pytest.FixtureRequest, prepared: Path) -> Compared:
    """The reward whose name is the parameter; one at a time is in memory."""
    torch.set_num_threads(1)
    return Compared(request.param, prepared)


def of(*names: str) -> pytest.MarkDecorator:
    """Run with each of these rewards."""
    return pytest.mark.parametrize("compared", names, indirect=True, scope="module")


@of(*SQUARES)
def test_the_same_pixels_give_the_same_score(compared: Compared, deviations: Deviations) -> None:
    """On the squares that the reference cut: nothing but the networks, tokenizers and constants is left to differ."""
    found = compared.deviation(list(range(len(compared.pairs))), square=True)
    deviations["comparisons"][f"{compared.name}, same pixels"] = found
    deviations["tolerances"][f"{compared.name}, same pixels"] = compared.case.exact
    assert found <= compared.case.exact


@of(*CASES)
def test_the_same_files_give_the_same_score(compared: Compared, deviations: Deviations) -> None:
    """From the picture's file on, over all aspect ratios and prompts."""
    found = compared.deviation(list(range(len(compared.pairs))), square=False)
    deviations["comparisons"][f"{compared.name}, end to end"] = found
    deviations["tolerances"][f"{compared.name}, end to end"] = compared.case.whole
    assert found <= compared.case.whole


@of("hpsv2.1", *SQUARES)
def test_reference_scores_depend_on_pictures_and_prompts(compared: Compared) -> None:
    """At least a hundred times the tolerance, or agreement would mean little."""
    expected = dict(zip(compared.pairs, compared.expected, strict=True))
    (first, prompt), (second, _), *_ = compared.pairs
    assert abs(expected[first, prompt] - expected[second, prompt]) >= 100 * compared.case.exact
    (other,) = (text for picture, text in compared.pairs if picture == first and text != prompt)
    if compared.case.reads:
        assert abs(expected[first, prompt] - expected[first, other]) >= 100 * compared.case.exact
    else:
        assert expected[first, prompt] == expected[first, other]


@of("imagereward")
def test_the_gradient_is_that_of_the_reference(compared: Compared, prepared: Path, deviations: Deviations) -> None:
    """Of the score by the normalised pixels of the first picture, against the package's differentiable path."""
    picture, prompt = compared.pairs[0]
    image = compared.image(picture, square=True).requires_grad_()
    compared.reward(image, [Prompt("0", prompt, {})]).sum().backward()
    assert image.grad is not None
    found = image.grad * torch.tensor(imagereward.CLIP_STD).view(1, 3, 1, 1)
    expected = torch.from_numpy(np.load(prepared / "reference" / "imagereward" / "gradient.npy"))
    relative = ((found - expected).norm() / expected.norm()).item()
    deviations["comparisons"]["imagereward, gradient, relative"] = relative
    deviations["tolerances"]["imagereward, gradient, relative"] = 1e-4
    assert expected.norm() > 0
    assert relative <= 1e-4


@dataclass(frozen=True)
class Alteration:
    """A mistake that the comparison has to find.

    Attributes:
        reward: Name of the reward.
        what: In words, for the table.
        module: Where the altered name is.
        attribute: What is altered.
        change: From what it is to what it is replaced by.
        pair: Index of the pair that shows it.
        square: Whether it is compared on the same pixels.
        rebuild: Whether it takes effect when the reward is built.
    """

    reward: str
    what: str
    module: Any
    attribute: str
    change: Callable[[Any], Any]
    pair: int = 1
    square: bool = True
    rebuild: bool = False


def third_digit(values: tuple[float, ...]) -> tuple[float, ...]:
    """The first value with its third digit one higher."""
    return values[0] + 1e-3, *values[1:]


def times(factor: float) -> Callable[[float], float]:
    """A number that many times as large."""
    return lambda value: value * factor


def exchanged(one: str, other: str) -> Callable[[Any], Any]:
    """A reader of weights that takes one part of a name for the other."""

    def rename(name: str) -> str:
        return name.replace(one, "?").replace(other, one).replace("?", other)

    return lambda read: lambda *arguments: {rename(name): value for name, value in read(*arguments).items()}


def with_options(**options: Any) -> Callable[[Any], Any]:
    """A function or class with these arguments, whatever its caller says."""
    return lambda function: lambda *arguments, **given: function(*arguments, **(given | options))


def unfiltered(letterbox: Any) -> Any:
    """Without antialiasing, as torchvision resized tensors up to 0.16."""
    return lambda images, size, antialias: letterbox(images, size, False)


def clamped(letterbox: Any) -> Any:
    """Bicubic overshoot cut off, as pictures of 8 bits do."""
    return lambda images, size, antialias: letterbox(images, size, antialias).clamp(0, 1)


def cropped(letterbox: Any) -> Any:
    """The middle square instead."""
    return resize_shortest_side_and_crop


def with_activation(name: str) -> Callable[[Any], Any]:
    """A configuration of transformers' CLIPModel with another activation in both towers."""
    towers = ("text_config", "vision_config")
    return lambda config: config | {tower: config[tower] | {"hidden_act": name} for tower in towers}


def with_eight_heads(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers has it by default for BLIP's text encoder."""
    return config | {"text": config["text"] | {"num_attention_heads": 8}}


def with_exchanged_norms(renamed: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The first normalisation of each layer of the picture's encoder for the second."""
    wrong = (
        (rf"blip\.visual_encoder\.blocks\.(\d+)\.norm{one}\.(.+)", rf"vision.encoder.layers.\1.layer_norm{other}.\2")
        for one, other in ((1, 2), (2, 1))
    )
    return (*wrong, *renamed)


def repairing(make: Callable[[], Any]) -> Callable[[], Any]:
    """A tokenizer that resolves HTML entities, as open_clip's does and transformers' does not."""

    def made() -> Any:
        tokenizer = make()
        return lambda text, **options: tokenizer(html.unescape(text), **options)

    return made


PORTRAIT, CAT, TALL, ROCKET, NOISE = range(5)  # indices of pairs
ALTERATIONS = (
    Alteration("hpsv2.1", "third digit of CLIP's mean", hpsv2, "CLIP_MEAN", third_digit, CAT, square=False),
    Alteration("hpsv2.1", "third digit of CLIP's deviation", hpsv2, "CLIP_STD", third_digit, CAT, square=False),
    Alteration("hpsv2.1", "no antialiasing", hpsv2, "letterbox", unfiltered, PORTRAIT, square=False),
    Alteration("hpsv2.1", "clamped after resizing", hpsv2, "letterbox", clamped, ROCKET, square=False),
    Alteration("hpsv2.1", "cropped, not letterboxed", hpsv2, "letterbox", cropped, ROCKET, square=False),
    Alteration(
        "hpsv2.1", "ln_1 and ln_2 exchanged", _clip, "read_state", exchanged("ln_1", "ln_2"), CAT, False, rebuild=True
    ),
    Alteration("pickscore", "third digit of CLIP's mean", pickscore, "CLIP_MEAN", third_digit),
    Alteration(
        "pickscore",
        "no antialiasing",
        pickscore,
        "resize_shortest_side_and_crop",
        with_options(antialias=False),
        NOISE,
        square=False,
    ),
    Alteration(
        "pickscore",
        "crop rounded as torchvision's",
        pickscore,
        "resize_shortest_side_and_crop",
        with_options(crop="round"),
        TALL,
        square=False,
    ),
    Alteration("pickscore", "quick GELU", pickscore, "VIT_H_14", with_activation("quick_gelu"), rebuild=True),
    Alteration(
        "pickscore",
        "queries and keys exchanged",
        pickscore,
        "clip_state",
        exchanged("q_proj", "k_proj"),
        rebuild=True,
    ),
    Alteration("pickscore", "HTML entities resolved", pickscore, "_tokenizer", repairing, ROCKET, rebuild=True),
    Alteration("aesthetic", "third digit of CLIP's mean", aesthetic, "CLIP_MEAN", third_digit),
    Alteration("aesthetic", "embedding not normalised", aesthetic, "unit", lambda unit: lambda vectors: vectors),
    Alteration("aesthetic", "plain GELU", aesthetic, "VIT_L_14", with_activation("gelu"), rebuild=True),
    Alteration(
        "aesthetic",
        "crop rounded as transformers'",
        aesthetic,
        "resize_shortest_side_and_crop",
        with_options(crop="floor"),
        TALL,
        square=False,
    ),
    Alteration("imagereward", "third digit of CLIP's mean", imagereward, "CLIP_MEAN", third_digit),
    Alteration("imagereward", "fifth digit of the score's mean", imagereward, "MEAN", times(1.0001)),
    Alteration(
        "imagereward",
        "no antialiasing",
        imagereward,
        "resize_shortest_side_and_crop",
        with_options(antialias=False),
        PORTRAIT,
        square=False,
    ),
    Alteration(
        "imagereward",
        "epsilon 1e-5 in the picture's encoder",
        transformers,
        "BlipVisionConfig",
        with_options(layer_norm_eps=1e-5),
        rebuild=True,
    ),
    Alteration("imagereward", "8 heads in the text encoder", imagereward, "PUBLISHED", with_eight_heads, rebuild=True),
    Alteration(
        "imagereward", "causal text encoder", transformers.BlipTextModel, "forward", with_options(is_decoder=True)
    ),
    Alteration("imagereward", "norm1 and norm2 exchanged", imagereward, "RENAMED", with_exchanged_norms, rebuild=True),
    Alteration("imagereward", "34 tokens", imagereward, "TOKENS", lambda tokens: tokens - 1, NOISE, rebuild=True),
)


@pytest.mark.parametrize(
    ("compared", "alteration"),
    [pytest.param(made.reward, made, id=f"{made.reward}: {made.what}") for made in ALTERATIONS],
    indirect=["compared"],
    scope="module",
)
def test_a_mistake_is_found(
    compared: Compared, alteration: Alteration, monkeypatch: pytest.MonkeyPatch, deviations: Deviations
) -> None:
    """An altered constant, step or name takes the score further off than the tolerance."""
    before = getattr(alteration.module, alteration.attribute)
    monkeypatch.setattr(alteration.module, alteration.attribute, alteration.change(before))
    reward = compared.built() if alteration.rebuild else compared.reward
    found = compared.deviation([alteration.pair], alteration.square, reward)
    tolerance = compared.case.exact if alteration.square else compared.case.whole
    deviations["alterations"][f"{alteration.reward}: {alteration.what}"] = found
    deviations["altered tolerances"][f"{alteration.reward}: {alteration.what}"] = tolerance
    assert found > tolerance
