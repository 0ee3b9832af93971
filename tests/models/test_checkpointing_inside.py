"""Gradient checkpointing inside the denoiser: less memory, the same gradients, and every recomputed row is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.api import Adapter, AdapterConfig, Cost, DenoiserConfig, Randomness, SamplerConfig, UserError
from harness.assembly import planned_cost
from harness.context import activation_bytes
from harness.metering import Meter, MeteredModel
from harness.registry import find_model, load_model
from harness.sampling import sample
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import CPU, lab, requests

INSIDE = DenoiserConfig(checkpoint_inside=True)


def built(directory: Path) -> StableDiffusion:
    """The tiny pipeline, adapter included, in double precision; alpha is three times the rank, factors are random."""
    model = StableDiffusion(str(directory), CPU, torch.float64)
    model.add_adapter(AdapterConfig(rank=2, alpha=6.0), Randomness(3))
    for name, parameter in model.adapter_parameters().items():
        parameter.data = 0.3 * Randomness(4).normal(parameter.shape, name, dtype=torch.float64)
    return model


@pytest.fixture(scope="module")
def plain(pipeline_directory: Path) -> StableDiffusion:
    """Keeps its activations."""
    return built(pipeline_directory)


@pytest.fixture(scope="module")
def inside(pipeline_directory: Path) -> StableDiffusion:
    """Recomputes them."""
    model = built(pipeline_directory)
    model.configure(INSIDE)
    return model


def noise(key: str) -> Tensor:
    """Latents of two pictures."""
    return Randomness(0).normal((2, 4, 8, 8), key, dtype=torch.float64)


def given(model: StableDiffusion) -> dict[str, Tensor]:
    """Other values of the adapter, with a gradient."""
    return {
        name: (0.3 * Randomness(7).normal(p.shape, name, dtype=torch.float64)).requires_grad_()
        for name, p in model.adapter_parameters().items()
    }


def passes(model: StableDiffusion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients by trained and by given parameters, of one graph through passes with different adapters.

    The last pass is without gradient, as another picture's would be: it leaves the layers at its own strength.
    """
    others = given(model)
    adapters = [Adapter(), Adapter(0.5), Adapter(0.0), Adapter(parameters=others), Adapter(0.7, others), Adapter(0.3)]
    condition = model.condition(["cat", "a dog"])
    x = noise("x").requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for i, adapter in enumerate(adapters):
        x = 0.5 * x + model.denoise(x, 100 + 150 * i, condition, adapter)
        total = total + (x * noise(f"weight {i}")).sum()
    with torch.no_grad():
        model.denoise(x, 500, condition, Adapter(2.0))
    trained = model.adapter_parameters()
    found = torch.autograd.grad(total, [*trained.values(), *others.values()])
    return dict(zip(trained, found, strict=False)), dict(zip(others, found[len(trained) :], strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To rounding in double precision."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_each_pass_is_recomputed_with_its_own_adapter(plain: StableDiffusion, inside: StableDiffusion) -> None:
    """Strengths 1, 0.5 and 0 and given parameters in one graph: the gradients of the model that keeps activations."""
    for found, expected in zip(passes(inside), passes(plain), strict=True):
        assert_equal(found, expected)


def test_plain_recomputation_would_be_wrong(pipeline_directory: Path, plain: StableDiffusion) -> None:
    """The passes above tell: recomputed as diffusers does by default, blocks see the strength of the last pass."""
    naive = built(pipeline_directory)
    naive.denoiser.enable_gradient_checkpointing()
    for found, expected in zip(passes(naive), passes(plain), strict=True):
        with pytest.raises(AssertionError):
            assert_equal(found, expected)


def test_layers_are_left_at_the_strength_of_the_last_pass(inside: StableDiffusion) -> None:
    """A backward pass does not change what the next call of a layer does."""
    condition = inside.condition(["cat", "a dog"])
    output = inside.denoise(noise("x"), 500, condition, Adapter(0.25))
    layer = inside.denoiser.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
    with torch.no_grad():
        inside.denoise(noise("x"), 500, condition, Adapter(2.0))
    output.sum().backward()
    assert layer.scaling["default"] == pytest.approx(6.0)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How many rows each call of a module had."""
    rows: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    yield rows
    handle.remove()


@pytest.mark.parametrize(("steps", "times"), [(False, 2), (True, 3)])
def test_recomputed_rows_are_counted(inside: StableDiffusion, steps: bool, times: int) -> None:
    """The meter says what a block's own counter says: twice inside alone, three times around each step, too."""
    meter = Meter()
    model = MeteredModel(inside, meter)
    assert model.checkpoint_inside
    config = SamplerConfig(steps=4, guidance=3.0)
    condition = model.condition(["cat", "a dog"])
    with counted(inside.denoiser.down_blocks[0].attentions[0].transformer_blocks[0]) as rows:
        latents = sample(model, noise("x"), condition, config, gradient_steps=2, checkpointing=steps)
        latents.sum().backward()
    inside.denoiser.zero_grad()

    assert meter.cost == Cost(forward_rows=8, gradient_rows=8, backward_rows=8, recomputed_rows=8 * (times - 1))
    assert sum(rows) == 8 + 8 * times


def test_it_combines_with_checkpointing_of_steps(plain: StableDiffusion, inside: StableDiffusion) -> None:
    """The chain's gradient is that without any checkpointing."""
    config = SamplerConfig(steps=4, guidance=3.0)

    def gradient(model: StableDiffusion, checkpointing: bool) -> dict[str, Tensor]:
        adapters: Callable[[Any], Adapter] = lambda step: Adapter(1.0 if step.index % 2 else 0.4)  # noqa: E731
        latents = sample(
            model,
            noise("x"),
            model.condition(["cat", "a dog"]),
            config,
            adapter=adapters,
            gradient_steps=3,
            checkpointing=checkpointing,
        )
        trained = model.adapter_parameters()
        found = torch.autograd.grad((latents * noise("weight")).sum(), list(trained.values()))
        return dict(zip(trained, found, strict=True))

    expected = gradient(plain, False)
    assert_equal(gradient(inside, False), expected)
    assert_equal(gradient(inside, True), expected)


def test_it_keeps_less(plain: StableDiffusion, inside: StableDiffusion) -> None:
    """Bytes that autograd keeps of one row; here the blocks' inputs are most of what is left."""
    assert activation_bytes(inside) < 0.6 * activation_bytes(plain)


def test_a_plan_includes_the_recomputed_rows(pipeline_directory: Path) -> None:
    """What a budget is planned with is what the meter counts."""
    model = load_model(find_model(str(pipeline_directory)), CPU, torch.float64, None, INSIDE)
    setup = lab(model, guidance=3.0)
    tuner = setup.tuner("draft-k", k=2)
    tuner.iterate(requests(model, tuner.requests_per_iteration))

    assert setup.meter.cost.recomputed_rows > 0
    assert setup.meter.cost == planned_cost(tuner, model).expected


def test_a_formula_has_no_network(gaussian: GaussianModel) -> None:
    """The option is refused, not passed over."""
    with pytest.raises(UserError, match="gaussian is a formula"):
        gaussian.configure(INSIDE)
    with pytest.raises(UserError, match="gaussian is a formula"):
        load_model(find_model("gaussian"), CPU, torch.float64, None, DenoiserConfig(compile=True))
