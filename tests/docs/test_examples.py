"""The examples of the documents work as they stand there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from harness import registry
from harness.api import Prompt, SamplerConfig
from models.gaussian import GaussianModel
from tests.fakes import CPU, QuadraticReward, evaluate, lab, requests

DOCS = Path(__file__).resolve().parents[2] / "docs"


def example(page: str, folder: Path) -> Path:
    """The page's example, written to the file that its first line names."""
    match = re.search(r"```python\n# (\S+\.py)\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None, f"{page} has no example"
    path = folder / Path(match[1]).name
    path.write_text(match[2], encoding="utf-8")
    return path


def module(path: Path) -> ModuleType:
    """The file as a module."""
    return registry._import_file(path)


def test_the_method_learns(tmp_path: Path) -> None:
    """The example is found by its path, costs what it plans, and raises its reward."""
    finetuner = registry.load_method(f"{example('adding-a-method.md', tmp_path)}:Evolution")
    assert finetuner.__doc__
    setup = lab(GaussianModel())
    tuner = setup.tuner(finetuner, optimizer={"learning_rate": 0.02})
    held_back = requests(setup.inner, 16, seed=1000)
    before = evaluate(setup, QuadraticReward(CPU), held_back)
    for i in range(30):
        batch = requests(setup.inner, tuner.requests_per_iteration, seed=i)
        # As in a run, no noise id comes twice: directions are keyed by it.
        tuner.iterate([replace(request, noise_id=100 * i + request.noise_id) for request in batch])

    assert evaluate(setup, QuadraticReward(CPU), held_back) > before
    assert setup.meter.cost == tuner.planned_cost().expected * 30


def test_the_reward_has_a_gradient(tmp_path: Path) -> None:
    """The example is found by its path, prefers red pictures, and differentiates."""
    reward = registry.load_reward(f"{example('adding-a-reward.md', tmp_path)}:Redness")(CPU)
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, 0], pictures[1, 1] = 1.0, 1.0
    pictures.requires_grad_()
    scores = reward(pictures, [])
    (gradient,) = torch.autograd.grad(scores.sum(), pictures)

    assert scores.tolist() == [1.0, -0.5]
    assert gradient.abs().sum() > 0


def test_functions_are_rewards(tmp_path: Path) -> None:
    """Both functions of the example score the mean of clamped pictures; one of them has a gradient."""
    text = (DOCS / "adding-a-reward.md").read_text(encoding="utf-8")
    match = re.search(r"```python\n# my/functions\.py\n(.*?)```", text, re.DOTALL)
    assert match is not None
    (tmp_path / "functions.py").write_text(match[1], encoding="utf-8")
    pictures = torch.full((2, 3, 4, 4), 0.2)
    pictures[1] = 1.0
    prompts = [Prompt("1", "dark"), Prompt("2", "bright")]
    for name, differentiable in (("brightness", False), ("smooth_brightness", True)):
        reward = registry.load_reward(f"{tmp_path}/functions.py:{name}")(CPU)
        assert reward(pictures, prompts).tolist() == pytest.approx([0.2, 1.0])
        assert reward.differentiable == differentiable


def test_the_model_draws_its_colours(tmp_path: Path) -> None:
    """The example's samples have the mean colour of the prompt, and an untrained adapter changes nothing."""
    from harness.api import Adapter, AdapterConfig, Randomness
    from harness.sampling import sample

    file = module(example("adding-a-model.md", tmp_path))
    model = file.load("swatches", CPU, torch.float64, None)
    noise = Randomness(0).normal((256, 3, 1, 1), "noise", dtype=torch.float64)
    condition = model.condition(["red"] * 256)
    sampler = SamplerConfig(steps=50, guidance=1.0)
    pictures = sample(model, noise, condition, sampler)
    model.add_adapter(AdapterConfig(), Randomness(0))

    assert pictures.mean((0, 2, 3)).tolist() == pytest.approx(file.COLOURS["red"], abs=0.05)
    assert torch.equal(pictures, sample(model, noise, condition, sampler, adapter=Adapter()).detach())


def test_the_suite_has_three_splits(tmp_path: Path) -> None:
    """The example's splits are disjoint and none is empty."""
    suite = module(example("adding-a-suite.md", tmp_path)).suite()
    ids = [{p.id for p in split} for split in (suite.training, suite.validation, suite.held_out)]

    assert all(ids)
    assert sum(map(len, ids)) == len(set.union(*ids))


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link of a document names a file that exists."""
    text = (DOCS / page).read_text(encoding="utf-8")
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]

    assert [target for target in targets if target and not (DOCS / target).exists()] == []
