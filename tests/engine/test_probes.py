"""Probes of gradients: norms against finite differences, statistics against sums over all pairs of iterations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import Adapter, Prompt, Randomness, Request, UserError
from harness.grid import Arm
from harness.metering import TrainingReward
from harness.probes import Moments, gradient_norms, gradient_variance, independent_requests
from harness.registry import load_method
from harness.sampling import Step, evaluation_noise, initial_latents, sample
from harness.store import PROBE_COLUMNS
from methods.draft import Draft
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import (
    CPU,
    STILL,
    BrightnessReward,
    BrokenReward,
    Lab,
    QuadraticReward,
    lab,
    mean_reward,
    reference_chain,
    requests,
)

GIVEN_LATER = {"cell", "arm", "method", "training_reward", "seed", "point"}


def values(rows: Sequence[Mapping[str, Any]], quantity: str, **where: Any) -> list[float]:
    """Values of a quantity by sampling step."""
    found = [row for row in rows if row["quantity"] == quantity and all(row[k] == v for k, v in where.items())]
    return [row["value"] for row in sorted(found, key=lambda row: row["step"])]


def central_norm(reward: Any, at: Tensor, h: float = 1e-4) -> float:
    """Norm of the gradient of `reward` by central differences, one coordinate after the other."""
    parts = []
    for i in range(at.numel()):
        direction = torch.zeros_like(at).flatten()
        direction[i] = h
        direction = direction.view_as(at)
        parts.append((reward(at + direction) - reward(at - direction)) / (2 * h))
    return math.hypot(*parts)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_norms_equal_finite_differences(gaussian: GaussianModel, eta: float) -> None:
    """Move the latent that enters a step, or the parameters of that step alone, and run the rest of the chain."""
    setup = lab(gaussian, eta=eta, guidance=1.0)
    (request,) = requests(gaussian, 1)
    sampler, at = setup.context.sampler, setup.parameters()
    entering: list[Tensor] = []

    def run(x: Tensor, start: int = 0, adapters: Mapping[int, Adapter] | None = None, **options: Any) -> float:
        def adapter(step: Step) -> Adapter:
            return (adapters or {}).get(step.index, Adapter())

        condition, noise = gaussian.condition(["a"]), evaluation_noise(gaussian, [request])
        with torch.no_grad():
            x_0 = sample(gaussian, x, condition, sampler, adapter=adapter, noise=noise, start=start, **options)
        return float(mean_reward(setup, x_0, [request]))

    def watch(step: Step, x: Tensor, *others: object) -> None:
        entering.append(x)

    x_T = initial_latents(gaussian, [request])
    run(x_T, observe=watch)
    rows = gradient_norms(gaussian, QuadraticReward(CPU), [request], sampler)
    assert len(rows) == 3 * 4
    for step in range(4):
        by_latent = central_norm(lambda x, step=step: run(x, start=step), entering[step])
        assert values(rows, "norm-latents")[step] == pytest.approx(by_latent, rel=1e-6)

        def moved(theta: Tensor, step: int = step) -> float:
            return run(x_T, adapters={step: Adapter(parameters=dict(zip(at, theta, strict=True)))})

        by_adapter = central_norm(moved, torch.stack(list(at.values())))
        assert values(rows, "norm-adapter")[step] == pytest.approx(by_adapter, rel=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_totals_are_the_truncated_gradients(tiny_model: StableDiffusion, checkpointing: bool) -> None:
    """With and without guidance, the total from step T-K on is the norm of what truncation to K steps leaves."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    sampler = setup.context.sampler
    parameters = list(tiny_model.adapter_parameters().values())
    rows = gradient_norms(tiny_model, QuadraticReward(CPU), batch, sampler, checkpointing=checkpointing)
    assert {row["guidance"] for row in rows} == {sampler.guidance, 1.0}
    for guidance, request in itertools.product((sampler.guidance, 1.0), batch):
        where = {"guidance": guidance, "prompt_id": request.prompt.id, "noise_id": request.noise_id}
        totals = values(rows, "norm-adapter-total", **where)
        own = sampler.model_copy(update={"guidance": guidance})
        condition = tiny_model.condition([request.prompt.text])
        for k in (1, 2, 4):
            x_0 = sample(tiny_model, initial_latents(tiny_model, [request]), condition, own, gradient_steps=k)
            found = torch.autograd.grad(mean_reward(setup, x_0, [request]), parameters)
            assert totals[4 - k] == pytest.approx(float(torch.cat([g.flatten() for g in found]).norm()), rel=1e-9)
        assert values(rows, "norm-adapter", **where)[3] == totals[3]
        assert totals[0] != pytest.approx(math.hypot(*values(rows, "norm-adapter", **where)), rel=1e-3)


def test_norms_leave_everything_as_it_was(tiny_model: StableDiffusion) -> None:
    """Adapter, accumulated gradients and the global generator; rows fill all columns that are no identity."""
    setup = lab(tiny_model)
    before = setup.parameters()
    for parameter in tiny_model.adapter_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    state = torch.get_rng_state()
    with torch.no_grad():
        rows = gradient_norms(tiny_model, QuadraticReward(CPU), requests(tiny_model, 1), setup.context.sampler)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in tiny_model.adapter_parameters().items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is not None
        assert bool((parameter.grad == 1).all())
        parameter.grad = None
    assert all(row.keys() == PROBE_COLUMNS.keys() - GIVEN_LATER for row in rows)
    assert {(row["step"], row["t"]) for row in rows} == {(0, 999), (1, 749), (2, 499), (3, 249)}


def test_norms_that_are_no_numbers_are_kept(gaussian: GaussianModel) -> None:
    """A reward with an infinite gradient shows; one without any is refused."""

    class Cliff(QuadraticReward):
        def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return (images_BCHW - images_BCHW.detach()).flatten(1).sum(1).sqrt()

    setup, batch = lab(gaussian, guidance=1.0), requests(gaussian, 2)
    rows = gradient_norms(gaussian, Cliff(CPU), batch, setup.context.sampler)
    assert len(rows) == 2 * 3 * 4
    assert not any(math.isfinite(row["value"]) for row in rows)
    with pytest.raises(UserError, match="no gradient"):
        gradient_norms(gaussian, BrightnessReward(CPU), batch, setup.context.sampler)


def arm(setup: Lab, method: str | type[Draft], label: str = "", **settings: Any) -> Arm:
    """An arm of the lab."""
    found = load_method(method) if isinstance(method, str) else method
    still = {"optimizer": STILL} if "optimizer" in found.Config.model_fields else {}
    config = found.Config.model_validate({**still, **settings})
    return Arm(label or str(method), str(method), found, config, setup.context.sampler, "off", {})


def measure(setup: Lab, arms: Sequence[Arm], batch: Sequence[Request], iterations: int) -> dict[str, dict[str, float]]:
    """Values by estimator and quantity."""
    rows = gradient_variance(
        arms,
        setup.inner,
        lambda meter: TrainingReward([(1.0, QuadraticReward(CPU))], meter, "quadratic"),
        lambda arm: setup.context,
        iter(batch),
        iterations,
    )
    assert all(row.keys() == PROBE_COLUMNS.keys() - GIVEN_LATER for row in rows)
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["estimator"], {})[row["quantity"]] = row["value"]
    return found


def by_hand(setup: Lab, batch: Sequence[Request], steps: int) -> Tensor:
    """Gradient of minus the mean reward through the last steps of a chain that is written out independently."""
    parameters = list(setup.inner.adapter_parameters().values())
    frozen = Adapter(parameters=setup.parameters())
    adapters = [frozen] * (4 - steps) + [Adapter()] * steps
    latents = reference_chain(setup.inner, batch, setup.context.sampler, adapters)
    found = torch.autograd.grad(-mean_reward(setup, latents, batch), parameters)
    return torch.cat([part.flatten() for part in found])


def test_statistics_are_those_of_the_gradients_by_hand(tiny_model: StableDiffusion) -> None:
    """Every quantity from gradients found independently, products summed over all pairs of different iterations."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 6)
    shares = [batch[0:2], batch[2:4], batch[4:6]]
    full = torch.stack([by_hand(setup, share[:1], 4) for share in shares])
    last = torch.stack([by_hand(setup, share, 1) for share in shares])
    before = setup.parameters()
    arms = [arm(setup, "draft", batch_size=1), arm(setup, "draft-k", k=1, batch_size=2)]
    found = measure(setup, arms, batch, 3)

    def product(a: Tensor, b: Tensor) -> float:
        return sum(float(a[i] @ b[j]) for i, j in itertools.permutations(range(3), 2)) / 6

    for name, gradients in (("draft", full), ("draft-k", last)):
        assert found[name]["squared-mean"] == pytest.approx(product(gradients, gradients), rel=1e-8)
        assert found[name]["variance"] == pytest.approx(float(gradients.var(0).sum()), rel=1e-8)
    norms = product(full, full) * product(last, last)
    assert norms > 0
    assert found["draft-k"]["cosine"] == pytest.approx(product(full, last) / norms**0.5, rel=1e-8)
    assert found["draft"]["cosine"] == pytest.approx(1.0, rel=1e-12)
    for name, parameter in tiny_model.adapter_parameters().items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_accumulated_gradients_survive(gaussian: GaussianModel) -> None:
    """What training has accumulated is there after the probe, also where a method fails in it."""
    setup = lab(gaussian)
    for parameter in gaussian.adapter_parameters().values():
        parameter.grad = torch.full_like(parameter, 7.0)
    measure(setup, [arm(setup, "draft", batch_size=1)], requests(gaussian, 2), 2)
    with pytest.raises(UserError, match="twice made 2 optimiser steps"):
        measure(setup, [arm(setup, Twice, "twice", batch_size=1)], requests(gaussian, 2), 2)
    assert all(bool((p.grad == 7).all()) for p in gaussian.adapter_parameters().values() if p.grad is not None)
    assert all(p.grad is not None for p in gaussian.adapter_parameters().values())


class Twice(Draft):
    """Takes two optimiser steps in an iteration."""

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """One update after the other."""
        super().iterate(requests)
        return super().iterate(requests)


def test_variance_falls_with_the_batch(gaussian: GaussianModel) -> None:
    """Four independent pictures: a quarter of the variance (standard error of the ratio: a tenth), the same mean."""
    setup = lab(gaussian, guidance=1.0)
    prompts, draws = [Prompt("p", "a")], Randomness(3)
    batch = list(itertools.islice(independent_requests(prompts, gaussian.latent_shape, draws), 4 * 300))
    found = measure(setup, [arm(setup, "draft", str(n), batch_size=n) for n in (1, 4)], batch, 300)
    assert found["1"]["variance"] / found["4"]["variance"] == pytest.approx(4.0, rel=0.3)
    assert found["1"]["squared-mean"] == pytest.approx(found["4"]["squared-mean"], rel=0.3)
    assert found["4"]["cosine"] == pytest.approx(1.0, abs=0.05)


def test_costs_are_the_planned_ones(gaussian: GaussianModel) -> None:
    """Of one iteration; methods without a reward's gradient, or without training, are left out."""
    setup = lab(gaussian, guidance=4.0)
    small = {"draft": {"batch_size": 2}, "draft-k": {"k": 2, "batch_size": 3}, "draft-lv": {"n": 2, "batch_size": 1}}
    arms = [arm(setup, name, **settings) for name, settings in small.items()]
    others = [arm(setup, name) for name in ("ddpo", "rwr", "best-of-n", "guidance")]
    found = measure(setup, [others[0], *arms, *others[1:]], requests(gaussian, 9), 3)
    assert list(found) == list(small)
    for name, settings in small.items():
        planned = setup.tuner(name, **settings).planned_cost().expected
        assert found[name]["rows"] == planned.denoiser_rows
        assert found[name]["queries"] == planned.queries
        assert found[name]["requests"] == settings["batch_size"]


def test_a_refused_gradient_is_no_number(gaussian: GaussianModel) -> None:
    """A method that stops at a reward that is not finite has no statistics."""
    setup = lab(gaussian)
    rows = gradient_variance(
        [arm(setup, "draft", batch_size=1)],
        gaussian,
        lambda meter: TrainingReward([(1.0, BrokenReward(CPU))], meter, "broken"),
        lambda arm: setup.context,
        iter(requests(gaussian, 2)),
        2,
    )
    found = {row["quantity"]: row["value"] for row in rows}
    assert all(math.isnan(found[name]) for name in ("squared-mean", "variance", "cosine"))
    assert found["queries"] == 1
    assert gradient_variance([], gaussian, lambda meter: setup.reward, lambda arm: setup.context, iter(()), 2) == []


def test_moments_are_unbiased() -> None:
    """Over many small samples with large scatter: mean squares and products of expectations come out."""
    draws = torch.Generator().manual_seed(0)
    a, b = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([0.0, 1.0, -1.0]).double()
    found = []
    for _ in range(4000):
        moments = Moments()
        for _ in range(3):
            noise = torch.randn(3, dtype=torch.float64, generator=draws)
            moments.add(a + noise, b + 0.5 * noise)
        found.append((moments.squared_mean, moments.inner, moments.variance))
    estimates = torch.tensor(found).double()
    error = estimates.std(0) / len(found) ** 0.5
    assert bool(((estimates.mean(0) - torch.tensor([5.0, 2.0, 3.0])).abs() < 4 * error).all())
    assert bool((error < 0.1).all())


def test_independent_requests_repeat_prompts_but_not_noise() -> None:
    """Uniform over prompts, with replacement; the same again for the same randomness."""
    prompts = [Prompt(name, name) for name in "abc"]
    first, again = (list(itertools.islice(independent_requests(prompts, (1,), Randomness(1)), 300)) for _ in "12")
    counts = [sum(request.prompt.id == name for request in first) for name in "abc"]
    assert sum(counts) == 300
    assert min(counts) > 70
    assert len({float(request.noise) for request in first}) == 300
    assert [(r.prompt, r.noise_id, float(r.noise)) for r in first] == [
        (r.prompt, r.noise_id, float(r.noise)) for r in again
    ]
    epochs = [{request.prompt.id for request in first[i : i + 3]} for i in range(0, 300, 3)]
    assert any(len(epoch) < 3 for epoch in epochs)
