"""Functions as rewards: both forms, what they are given, and what is said of those that do something else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.config import resolve
from harness.errors import UserError
from harness.grid import Grid
from harness.prompts import Prompt
from harness.randomness import Randomness
from harness.registry import load_reward
from harness.reward_sources import find_reward
from harness.rewarding import Reward

CPU = torch.device("cpu")
PROMPTS = [Prompt("1", "a fox", {"object": "fox"}), Prompt("2", "an owl"), Prompt("3", "a crab")]
SOURCE = '''
import io

import numpy as np
import torch
from PIL import Image


def bytes_of_jpeg():
    """Size of the file, written as in the DDPO lineage."""
    calls = []

    def score(images, prompts, metadata):
        calls.append(len(images))
        if isinstance(images, torch.Tensor):
            images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            images = images.transpose(0, 2, 3, 1)
        sizes = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="JPEG", quality=95, subsampling="4:2:0")
            sizes.append(-file.tell() / 1000)
        return np.array(sizes), {"calls": calls}

    return score


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2)), {}


def smooth_red(images, prompts, metadata):
    return images[:, 0].square().mean((1, 2)), {}


smooth_red.differentiable = True


def cut(images, prompts, metadata):
    return images[:, 0].detach().mean((1, 2)), {}


cut.differentiable = True


def what_it_got(images, prompts, metadata):
    assert images.dtype == torch.float32 and not images.requires_grad
    assert prompts == ("a fox", "an owl", "a crab")
    assert metadata == ({"object": "fox"}, {}, {})
    return [float(images.min()), float(images.max()), 3], {}


def one_too_few(images, prompts, metadata):
    return [1.0] * (len(images) - 1), {}


def a_column(images, prompts, metadata):
    return images[:, :1, 0, 0], {}


def only_scores(images, prompts, metadata):
    return [1.0] * len(images)


def words(images, prompts, metadata):
    return prompts, {}


def nan(images, prompts, metadata):
    return [1.0, float("nan"), 2.0], {}


def raising(images, prompts, metadata):
    return 1 / 0, {}


def two_arguments(images, prompts):
    return [], {}


def no_function():
    return 3


def broken_factory():
    raise FileNotFoundError("weights.bin")


number = 3
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of functions."""
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def images() -> Tensor:
    """Three pictures with values outside [0, 1]."""
    return 0.5 + 0.4 * Randomness(0).normal((3, 3, 16, 16), "pictures")


def built(file: Path, name: str) -> Reward:
    """An instance of the reward that a function makes."""
    return load_reward(f"{file}:{name}")(CPU)


def test_a_factory_of_the_ddpo_lineage_scores_as_the_same_reward_here(file: Path, images: Tensor) -> None:
    """Numpy scores of the real codec: the same numbers as `jpeg-bytes`."""
    reward = built(file, "bytes_of_jpeg")
    expected = load_reward("jpeg-bytes")(CPU)(images, PROMPTS)
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)


def test_a_function_scores_clamped_pictures_without_gradient(file: Path, images: Tensor) -> None:
    """Values outside [0, 1] do not reach it, and no gradient comes back."""
    reward = built(file, "red")
    scores = reward(images.requires_grad_(), PROMPTS)
    assert torch.equal(scores, images.detach().clamp(0, 1)[:, 0].mean((1, 2)))
    assert not scores.requires_grad
    assert not reward.differentiable


def test_a_differentiable_function_sees_pictures_as_they_are(file: Path, images: Tensor) -> None:
    """Its gradient is 2 x / (H W) in the red channel, also beyond [0, 1]."""
    reward = built(file, "smooth_red")
    assert reward.differentiable
    scores = reward(images.requires_grad_(), PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    expected = torch.zeros_like(images)
    expected[:, 0] = 2 * images.detach()[:, 0] / 256
    torch.testing.assert_close(gradient, expected)
    with torch.no_grad():
        assert not reward(images, PROMPTS).requires_grad


def test_what_it_is_given(file: Path, images: Tensor) -> None:
    """Pictures in [0, 1], texts and labels; a list of numbers is enough."""
    assert built(file, "what_it_got")(images, PROMPTS).tolist() == [0.0, 1.0, 3.0]


def test_a_picture_that_is_not_finite_scores_nan_alone(file: Path, images: Tensor) -> None:
    """The others keep their scores."""
    images[1, 2, 3, 4] = float("inf")
    for name in ("red", "bytes_of_jpeg", "smooth_red"):
        assert built(file, name)(images, PROMPTS).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_too_few", r"scores of shape \(2,\) for 3 pictures"),
        ("a_column", r"scores of shape \(3, 1\) for 3 pictures"),
        ("only_scores", r"returned a list instead of the pair \(scores, info\)"),
        ("words", "scores that are no numbers"),
        ("nan", "returned nan for a picture of 'an owl'"),
        ("raising", r"raised ZeroDivisionError: division by zero \(.*mine.py, line \d+\)"),
        ("cut", "its scores do not depend on the pictures"),
    ],
)
def test_functions_that_return_something_else_are_explained(
    file: Path, images: Tensor, name: str, message: str
) -> None:
    """The message names the function."""
    reward = built(file, name)
    with pytest.raises(UserError, match=rf"mine.py:{name} .*{message}"):
        reward(images.requires_grad_(), PROMPTS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_arguments", r"takes other arguments than a reward; write def function\(images, prompts, metadata\)"),
        ("no_function", "returned a int, not a function"),
        ("broken_factory", "raised FileNotFoundError: weights.bin"),
        ("number", "is no Reward"),
        ("missing", "has no missing"),
    ],
)
def test_what_cannot_be_a_reward_is_refused_before_it_scores(file: Path, name: str, message: str) -> None:
    """When it is loaded or built."""
    with pytest.raises(UserError, match=message):
        built(file, name)


def test_the_version_is_the_files(file: Path) -> None:
    """Other code is another version, so that no run mixes them; it scores only runs that name it."""
    source = find_reward(f"{file}:red", {})
    assert source.version == hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert (source.reward.role, source.reward.family, source.reward.name) == ("proxy", "named", f"{file}:red")
    file.write_text(SOURCE.replace("[:, 0]", "[:, 1]"))
    assert find_reward(f"{file}:red", {}).version != source.version


def test_a_method_that_needs_the_gradient_refuses_a_function_without(file: Path) -> None:
    """As for any other reward, before anything is spent."""
    asked = {"model": "gaussian", "methods": ["draft"], "seeds": [0], "preset": "smoke"}
    with pytest.raises(UserError, match="draft needs the reward's gradient"):
        Grid(resolve({**asked, "rewards": [f"{file}:red"]}))
    grid = Grid(resolve({**asked, "rewards": [f"{file}:smooth_red"]}))
    assert f"{file}:smooth_red" in grid.rewards
