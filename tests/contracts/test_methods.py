"""What every method must hold, for each that is found in methods/ or installed."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pytest
import torch

from harness.api import DiffusionModel, Generation, Randomness, TrainedFineTuner
from harness.registry import discover, load_method
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import CPU, BrightnessReward, Lab, QuadraticReward, evaluate, lab, requests

METHODS = sorted(discover("methods"))
# Small enough for a chain of four steps; a method takes those that it has.
SMALL = {"per_prompt_minimum": 2, "batch_size": 4, "rollout_size": 4, "m": 3, "optimizer": {"learning_rate": 1e-2}}


def small(method: str) -> dict[str, Any]:
    """Settings of a method for four steps and a handful of pictures."""
    return {name: value for name, value in SMALL.items() if name in load_method(method).Config.model_fields}


def parameters(setup: Lab) -> dict[str, torch.Tensor]:
    """Copies of the adapter's parameters."""
    return {name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(model: DiffusionModel, method: str, seed: int = 0, iterations: int = 2) -> dict[str, torch.Tensor]:
    """The parameters after some iterations from a fresh start."""
    setup = lab(model, seed=seed)
    tuner = setup.tuner(method, **small(method))
    for i in range(iterations):
        tuner.iterate(requests(model, tuner.requests_per_iteration, seed=100 * seed + i))
    return parameters(setup)


def on_disk(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint holds it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_methods_are_found() -> None:
    """The six of the first issue of this project are there."""
    assert {"draft", "draft-k", "draft-lv", "refl", "ddpo", "ddpo-sf"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_trains_the_adapter_and_nothing_else(tiny_model: StableDiffusion, method: str) -> None:
    """Every parameter of the adapter moves, the base does not, and pictures change only with the adapter on."""
    setup = lab(tiny_model)
    tuner = setup.tuner(method, **small(method))
    batch = requests(tiny_model, tuner.requests_per_iteration)
    base = Generation(setup.context.sampler, lora_scale=0.0)
    before, weights, pictures = parameters(setup), tiny_model.fingerprint(), tuner.generate(batch, base)
    metrics = tuner.iterate(batch)
    after = parameters(setup)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert tiny_model.fingerprint() == weights
    assert torch.equal(tuner.generate(batch, base), pictures)
    assert {"reward", "gradient_norm"} <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_costs_what_it_planned(
    gaussian: GaussianModel, method: str, guidance: float, checkpointing: Literal["on", "off"]
) -> None:
    """The meter never exceeds the maximum, and shows the plan itself where no length is drawn."""
    setup = lab(gaussian, guidance=guidance, checkpointing=checkpointing, micro_batch=3)
    tuner = setup.tuner(method, **small(method))
    plan, spent = tuner.planned_cost(), []
    for seed in range(3):
        before = setup.meter.cost
        tuner.iterate(requests(gaussian, tuner.requests_per_iteration, seed))
        spent.append(asdict(setup.meter.cost - before))
    for cost in spent:
        assert {kind: count for kind, count in cost.items() if count > asdict(plan.maximal)[kind]} == {}
        if plan.expected == plan.maximal:
            assert cost == asdict(plan.expected)


@pytest.mark.parametrize("method", METHODS)
def test_expected_cost_is_the_mean(gaussian: GaussianModel, method: str) -> None:
    """Over many iterations the meter's rows come within a tenth of the expected ones."""
    setup = lab(gaussian, guidance=1.0)
    tuner = setup.tuner(method, **small(method))
    rounds = 1 if tuner.planned_cost().expected == tuner.planned_cost().maximal else 60
    everything = requests(gaussian, rounds * tuner.requests_per_iteration)
    for start in range(0, len(everything), tuner.requests_per_iteration):
        tuner.iterate(everything[start : start + tuner.requests_per_iteration])
    expected = tuner.planned_cost().expected.denoiser_rows
    assert setup.meter.cost.denoiser_rows / rounds == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_costs_what_it_planned_on_a_network(tiny_model: StableDiffusion, method: str) -> None:
    """The same on a UNet with checkpointing, where a recomputation ends inside the network."""
    setup = lab(tiny_model, checkpointing="on")
    tuner = setup.tuner(method, **small(method))
    plan = tuner.planned_cost()
    tuner.iterate(requests(tiny_model, tuner.requests_per_iteration))
    cost = asdict(setup.meter.cost)
    assert {kind: count for kind, count in cost.items() if count > asdict(plan.maximal)[kind]} == {}
    if plan.expected == plan.maximal:
        assert cost == asdict(plan.expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["gaussian", "tiny_model"])
def test_resumes_bit_for_bit(method: str, model: str, request: pytest.FixtureRequest) -> None:
    """Restored from the adapter and the state on disk, the next updates are those of the uninterrupted run."""
    found: DiffusionModel = request.getfixturevalue(model)
    setup = lab(found)
    tuner = setup.tuner(method, **small(method))
    size = tuner.requests_per_iteration
    streams = [requests(found, size, seed) for seed in range(4)]
    for stream in streams[:2]:
        tuner.iterate(stream)
    adapter, state = parameters(setup), on_disk(tuner.state_dict())
    for stream in streams[2:]:
        tuner.iterate(stream)
    uninterrupted = parameters(setup)

    again = lab(found)
    resumed = again.tuner(method, **small(method))
    with torch.no_grad():
        for name, parameter in again.inner.adapter_parameters().items():
            parameter.copy_(adapter[name])
    resumed.load_state_dict(copy.deepcopy(state))
    for stream in streams[2:]:
        resumed.iterate(stream)
    assert same(parameters(again), uninterrupted)


@pytest.mark.parametrize("method", METHODS)
def test_seeds_decide_the_result(gaussian: GaussianModel, method: str) -> None:
    """The same seed gives the same parameters bit for bit, another seed others."""
    first = trained(gaussian, method, seed=0)
    assert same(trained(gaussian, method, seed=0), first)
    assert not same(trained(gaussian, method, seed=1), first)


@pytest.mark.parametrize("method", METHODS)
def test_stochastic_is_what_it_says(gaussian: GaussianModel, method: str) -> None:
    """With the same requests and initial adapter, the method's own randomness matters exactly where it is declared."""
    found = []
    for seed in range(8):
        setup = lab(gaussian)
        setup.context.randomness = Randomness(seed, "method")
        tuner = setup.tuner(method, **small(method))
        tuner.iterate(requests(gaussian, tuner.requests_per_iteration))
        found.append(parameters(setup))
    assert any(not same(other, found[0]) for other in found[1:]) == load_method(method).stochastic


def _refuse(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name} draws from a global generator")

    return call


def _only_with_generator(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None:
            raise AssertionError(f"{name} draws from the global generator")
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("method", METHODS)
def test_never_touches_global_randomness(
    tiny_model: StableDiffusion, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Works with the global generators poisoned, and leaves their states as they were."""
    setup = lab(tiny_model, checkpointing="on")
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002 - the global one
    with monkeypatch.context() as poisoned:
        for name in ("randn", "rand", "randint", "randperm", "normal", "bernoulli", "multinomial"):
            poisoned.setattr(torch, name, _only_with_generator(f"torch.{name}", getattr(torch, name)))
        for name in ("normal_", "uniform_", "random_", "bernoulli_", "exponential_"):
            original = getattr(torch.Tensor, name)
            poisoned.setattr(torch.Tensor, name, _only_with_generator(f"Tensor.{name}", original))
        for name in ("randn_like", "rand_like", "randint_like", "manual_seed", "seed"):
            poisoned.setattr(torch, name, _refuse(f"torch.{name}"))
        for name in ("rand", "randn", "randint", "random", "normal", "uniform", "choice", "shuffle", "permutation"):
            poisoned.setattr(np.random, name, _refuse(f"numpy.random.{name}"))
        for name in ("random", "randint", "randrange", "choice", "shuffle", "gauss", "uniform", "sample"):
            poisoned.setattr(random, name, _refuse(f"random.{name}"))
        tuner: TrainedFineTuner = setup.tuner(method, **small(method))
        batch = requests(tiny_model, tuner.requests_per_iteration)
        tuner.iterate(batch)
        tuner.generate(batch, Generation(setup.context.sampler))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == str(states[1])  # noqa: NPY002 - the global one
    assert random.getstate() == states[2]


@pytest.mark.parametrize("method", METHODS)
def test_needs_a_reward_gradient_exactly_where_it_says(gaussian: GaussianModel, method: str) -> None:
    """A reward without a gradient trains a method that needs none, and is an error for one that does."""
    setup = lab(gaussian, BrightnessReward)
    tuner = setup.tuner(method, **small(method))
    batch = requests(gaussian, tuner.requests_per_iteration)
    if load_method(method).needs_reward_gradient:
        with pytest.raises(RuntimeError, match="grad"):
            tuner.iterate(batch)
    else:
        before = parameters(setup)
        tuner.iterate(batch)
        assert not same(parameters(setup), before)
        assert setup.meter.cost.reward_gradients == 0


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_setting_is_refused(method: str) -> None:
    """Settings are checked by name and frozen."""
    config = load_method(method).Config
    assert config.model_config["extra"] == "forbid"
    assert config.model_config["frozen"] is True


@pytest.mark.parametrize("method", METHODS)
def test_improves_the_reward(method: str) -> None:
    """On a Gaussian and a concave reward, fresh pictures come closer to the best: most of the way, or a good part.

    Policy gradients see only the score; they get more pictures and are asked for less.
    """
    model = GaussianModel()
    setup = lab(model, adapter=0.0, guidance=1.0, micro_batch=64)
    pathwise = load_method(method).needs_reward_gradient
    settings = small(method) | {"optimizer": {"learning_rate": 2e-2, "weight_decay": 0.0}}
    settings |= {"rollout_size": 64} if "rollout_size" in settings else {}
    tuner = setup.tuner(method, **settings)
    fresh, size = requests(model, 256, seed=77), tuner.requests_per_iteration
    before = evaluate(setup, QuadraticReward(CPU), fresh)
    stream = requests(model, size * (80 if pathwise else 40))
    for start in range(0, len(stream), size):
        tuner.iterate(stream[start : start + size])
    gain = (evaluate(setup, QuadraticReward(CPU), fresh) - before) / (0.0 - before)
    assert gain > (0.5 if pathwise else 0.2)
