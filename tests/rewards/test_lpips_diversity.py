"""Mean pairwise LPIPS: against the package lpips on the same weights, and what a batch means."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from harness.api import UserError
from harness.prompts import Prompt
from rewards.lpips_diversity import LpipsDiversity

CPU, META = torch.device("cpu"), torch.device("meta")
BACKBONE, HEADS = "alexnet-owt-7be5be79.pth", "alex.pth"
CONFIG = LpipsDiversity.Config()
CONVOLUTIONS = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
CLASSIFIER = {1: (4096, 9216), 4: (4096, 4096), 6: (1000, 4096)}


def backbone() -> dict[str, Tensor]:
    """Random weights in torchvision's layout of AlexNet: 16 tensors; the classifier's are one number each."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for index, shape in CONVOLUTIONS.items():
        fan = shape[1] * shape[2] * shape[3]
        state[f"features.{index}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        state[f"features.{index}.bias"] = 0.1 * torch.randn(shape[:1], generator=generator)
    for index, shape in CLASSIFIER.items():
        state[f"classifier.{index}.weight"] = torch.zeros(1).expand(shape)
        state[f"classifier.{index}.bias"] = torch.zeros(1).expand(shape[:1])
    return state


def heads() -> dict[str, Tensor]:
    """Random weights of the five layers; published ones are not negative either."""
    generator = torch.Generator().manual_seed(1)
    widths = (64, 192, 384, 256, 256)
    return {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=generator) for i, n in enumerate(widths)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both files; the heads in the format before torch 1.6, as they are published."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(backbone(), folder / BACKBONE)
    torch.save(heads(), folder / HEADS, _use_new_zipfile_serialization=False)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reward(files: dict[str, Path]) -> LpipsDiversity:
    """The reward in single precision; building it draws nothing from torch's global generator."""
    before = torch.get_rng_state()
    made = LpipsDiversity(CPU, CONFIG, files)
    assert torch.equal(before, torch.get_rng_state())
    return made


@pytest.fixture(scope="module")
def exact(files: dict[str, Path]) -> LpipsDiversity:
    """The reward in double precision."""
    return LpipsDiversity(CPU, CONFIG, files, torch.float64)


def noise(count: int, *size: int) -> Tensor:
    """Pictures in double precision, from smooth to rough."""
    pictures = torch.rand((count, 3, *size), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    smooth = F.avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)
    return torch.lerp(smooth, pictures, torch.linspace(0, 1, count, dtype=torch.float64).view(-1, 1, 1, 1))


def prompts(count: int) -> list[Prompt]:
    """Different ones."""
    return [Prompt(str(i), f"a fox {i}") for i in range(count)]


def distance(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS of two pictures (3, H, W) by its definition, place by place and channel by channel."""
    weights, total = {name: value.double() for name, value in (backbone() | heads()).items()}, torch.zeros(())
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)
    x = (2 * torch.stack([a, b]) - 1 - shift) / scale
    for layer, (index, stride, padding) in enumerate(((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))):
        if layer in (1, 2):
            x = F.max_pool2d(x, 3, 2)
        name = f"features.{index}"
        x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding).clamp(min=0)
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        squares = (unit[0] - unit[1]).square().flatten(1)
        total = total + (weights[f"lin{layer}.model.1.weight"].flatten() @ squares).mean()
    return total


def test_a_score_is_the_mean_distance_to_the_others(reward: LpipsDiversity, exact: LpipsDiversity) -> None:
    """By the definition, in double precision to rounding, in single precision to 1e-5."""
    pictures = noise(4, 40, 52)
    pairs = {frozenset((i, j)): distance(pictures[i], pictures[j]) for i in range(4) for j in range(i)}
    expected = torch.stack([torch.stack([d for pair, d in pairs.items() if i in pair]).mean() for i in range(4)])
    assert expected.std() > 0.05
    torch.testing.assert_close(exact(pictures, prompts(4)), expected, rtol=0, atol=1e-10)
    scores = reward(pictures.float(), prompts(4))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_distances_equal_those_of_the_package_lpips(files: dict[str, Path], reward: LpipsDiversity) -> None:
    """On the same random AlexNet, with the heads that the package brings."""
    lpips: Any = pytest.importorskip("lpips", reason="optional: pip install --no-deps lpips==0.1.4")
    with torch.random.fork_rng(devices=[]):
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for part in reference.net.children():
        for index, layer in part.named_children():
            if isinstance(layer, nn.Conv2d):
                layer.load_state_dict({name: backbone()[f"features.{index}.{name}"] for name in ("weight", "bias")})
    own = LpipsDiversity(CPU, CONFIG, {BACKBONE: files[BACKBONE]})
    pictures = noise(3, 64, 80).float()
    with torch.no_grad():
        table = torch.stack([reference(pictures, p.expand_as(pictures), normalize=True).flatten() for p in pictures])
    torch.testing.assert_close(own(pictures, prompts(3)), table.sum(1) / 2, rtol=1e-5, atol=1e-6)
    assert (own(pictures, prompts(3)) - reward(pictures, prompts(3))).abs().min() > 1e-3  # the heads matter


def test_the_gradient_is_that_of_finite_differences(exact: LpipsDiversity) -> None:
    """To every picture, since each is the others' other."""
    pictures = noise(3, 33, 40).requires_grad_(True)
    weights = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * exact(pictures, prompts(3))).sum(), pictures)
    direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        rise = exact(pictures + 1e-7 * direction, prompts(3)) - exact(pictures - 1e-7 * direction, prompts(3))
    assert float((gradient * direction).sum()) == pytest.approx(float((weights * rise).sum()) / 2e-7, rel=1e-4)
    assert (gradient.flatten(1).norm(dim=1) > 1e-4).all()


def test_equal_pictures_are_not_diverse_and_have_a_gradient(reward: LpipsDiversity) -> None:
    """Distance 0, exactly; a black batch, where whole layers may be silent, has no NaN in its gradient."""
    same = noise(1, 40, 40).float().expand(3, -1, -1, -1)
    assert reward(same, prompts(3)).tolist() == [0, 0, 0]
    black = torch.zeros(2, 3, 40, 40, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(black, prompts(2)).sum(), black)
    assert gradient.isfinite().all()


def test_silent_layers_have_a_gradient(files: dict[str, Path], tmp_path: Path) -> None:
    """Where a ReLU lets nothing through, the length over channels is 0 and its derivative must not be NaN."""
    state = backbone()
    state["features.10.bias"] = torch.full((256,), -100.0)
    torch.save(state, tmp_path / BACKBONE)
    pictures = noise(2, 40, 40).float().requires_grad_(True)
    scores = LpipsDiversity(CPU, CONFIG, {**files, BACKBONE: tmp_path / BACKBONE})(pictures, prompts(2))
    (gradient,) = torch.autograd.grad(scores.sum(), pictures)
    assert gradient.isfinite().all()
    assert float(gradient.norm()) > 0


def test_the_order_of_a_batch_does_not_matter_but_its_members_do(reward: LpipsDiversity) -> None:
    """Scores move with their pictures; another neighbour changes them; prompts do not."""
    pictures = noise(4, 40, 40).float()
    scores = reward(pictures, prompts(4))
    torch.testing.assert_close(reward(pictures.flip(0), [Prompt("p", "")] * 4).flip(0), scores, rtol=1e-5, atol=1e-6)
    assert (reward(pictures[:3], prompts(3)) - scores[:3]).abs().min() > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_picture_is_left_out(reward: LpipsDiversity, value: float) -> None:
    """It scores NaN; the others score as without it, with a finite gradient."""
    pictures = noise(4, 40, 40).float()
    kept = [0, 2, 3]
    expected = reward(pictures[kept], prompts(3))
    pictures[1, 1, 7, 7] = value
    pictures.requires_grad_(True)
    scores = reward(pictures, prompts(4))
    assert scores.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(scores[kept], expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(scores[kept].sum(), pictures)
    assert gradient.isfinite().all()


def test_a_picture_alone_scores_nan(reward: LpipsDiversity) -> None:
    """Also if it is the only one that is finite."""
    assert reward(noise(1, 40, 40).float(), prompts(1)).isnan().tolist() == [True]
    pictures = noise(2, 40, 40).float()
    pictures[0] = float("nan")
    assert reward(pictures, prompts(2)).isnan().tolist() == [True, True]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 1, 40, 40), "floating point"), ((2, 4, 40, 40), "floating point"), ((2, 3, 30, 64), "31x31, not 30x64")],
)
def test_odd_pictures_are_refused(reward: LpipsDiversity, shape: tuple[int, ...], message: str) -> None:
    """Other than three channels, or too small; 31x31 is enough."""
    with pytest.raises(ValueError, match=message):
        reward(torch.zeros(shape), prompts(2))
    assert reward(noise(2, 31, 31).float(), prompts(2)).isfinite().all()


def test_bfloat16_is_an_option(reward: LpipsDiversity, files: dict[str, Path]) -> None:
    """AlexNet computes in it; lengths, heads and the score are in single precision."""
    pictures = noise(3, 40, 40).float()
    scores = LpipsDiversity(CPU, CONFIG, files, torch.bfloat16)(pictures, prompts(3))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(pictures, prompts(3)), rtol=0.05, atol=0)


def altered(files: dict[str, Path], folder: Path, name: str, **changes: Tensor | None) -> dict[str, Path]:
    """The files with some tensors of one replaced, added or (None) removed."""
    state = torch.load(files[name], weights_only=True) | {key.replace("__", "."): v for key, v in changes.items()}
    torch.save({key: value for key, value in state.items() if value is not None}, folder / name)
    return {**files, name: folder / name}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (BACKBONE, {"features__10__bias": None}, r"lacks features\.10\.bias \(256,\)"),
        (BACKBONE, {"features__12__bias": torch.zeros(1)}, r"has besides features\.12\.bias"),
        (HEADS, {"lin2__model__1__weight": torch.zeros(1, 383, 1, 1)}, r"\(1, 383, 1, 1\) instead of \(1, 384, 1, 1\)"),
        (HEADS, {"lin5__model__1__weight": torch.zeros(1, 512, 1, 1)}, r"has besides lin5"),
    ],
)
@pytest.mark.parametrize("device", [CPU, META])
def test_what_does_not_fit_is_refused(
    files: dict[str, Path], tmp_path: Path, device: torch.device, name: str, changes: Any, message: str
) -> None:
    """A tensor too few or too many, and another shape, in either file."""
    with pytest.raises(UserError, match=message):
        LpipsDiversity(device, CONFIG, altered(files, tmp_path, name, **changes))


@pytest.fixture
def without_lpips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package lpips is not found."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lpips" else found(name, *rest)
    )
    return


@pytest.mark.usefixtures("without_lpips")
def test_missing_heads_name_the_remedy(files: dict[str, Path]) -> None:
    """Neither beside AlexNet nor in a package."""
    LpipsDiversity(META, CONFIG, files)
    with pytest.raises(UserError, match=r"put alex\.pth beside .*pip install --no-deps lpips==0\.1\.4"):
        LpipsDiversity(META, CONFIG, {BACKBONE: files[BACKBONE]})


def test_other_heads_in_a_package_are_refused(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version does not tell them apart."""
    heads = tmp_path / "lpips" / "weights" / "v0.1" / HEADS
    heads.parent.mkdir(parents=True)
    heads.write_bytes(files[HEADS].read_bytes())
    (tmp_path / "lpips" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"is not the published alex\.pth"):
        LpipsDiversity(META, CONFIG, {BACKBONE: files[BACKBONE]})
