"""Adjoint matching: the adjoint, the regression and its fixed point, each against something written without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import BASE, Adapter, Diverged, Prompt, Request, Reward, SamplerConfig, UserError
from harness.sampling import Step, Transition, initial_latents, sample, step_noise
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import (
    CPU,
    BrokenReward,
    Lab,
    QuadraticReward,
    assert_close,
    distance,
    gradients,
    lab,
    reference_noise,
    requests,
)
from tests.timed_gaussian import TimedGaussian, moments

LAMBDA = 30.0
ALL = {"reward_multiplier": LAMBDA, "stored_steps": None, "clip_quantile": None}
WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class LinearReward(Reward):
    """A weighted sum of the three pixels of the Gaussian model: its tilt is known."""

    name, version, differentiable, role, unit = "linear", "1", True, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores in the pictures' own precision."""
        return images_BCHW.flatten(1) @ WEIGHTS

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class ConstantReward(Reward):
    """The same score for every picture, with a gradient of zero."""

    name, version, differentiable, role, unit = "constant", "1", True, "proxy", "nothing"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """3, whatever is shown."""
        return 3.0 + 0.0 * images_BCHW.flatten(1).sum(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


def reference_mean(lab: Lab, x: Tensor, step: Step, batch: Sequence[Request], guidance: float, adapter: Adapter) -> Any:
    """Where a step with DDPM's noise leads on average, written out."""
    noise = reference_noise(lab.inner, x, step.t, [r.prompt.text for r in batch], guidance, adapter)
    x0 = (x - step.sigma * noise) / step.alpha
    return step.alpha_next * x0 + math.sqrt(step.sigma_next**2 - step.std**2) * noise


@torch.no_grad()
def reference_states(lab: Lab, tuner: Any, batch: Sequence[Request]) -> list[Tensor]:
    """x_T to x_0 of the chain that trains, written out."""
    noise = step_noise(lab.inner, batch, lab.context.randomness, "trajectory")
    states = [torch.stack([r.noise for r in batch]).double()]
    for step in tuner.steps:
        mean = reference_mean(lab, states[-1], step, batch, lab.context.sampler.guidance, Adapter())
        states.append(mean + step.std * noise(step) if step.std > 0 else mean)
    return states


def reference_adjoint(lab: Lab, tuner: Any, batch: Sequence[Request], states: list[Tensor]) -> list[Tensor]:
    """Gradient of -lambda * r by the states after each step, through one graph of base steps and fixed noises."""
    guidance = lab.context.sampler.guidance if tuner.config.guided_adjoint else 1.0
    chain = [states[0]]
    for step, x_next in zip(tuner.steps, states[1:], strict=True):
        mean = reference_mean(lab, chain[-1], step, batch, guidance, BASE)
        chain.append((mean + (x_next - mean).detach()).requires_grad_())
    reward = QuadraticReward(CPU)(lab.inner.decode(chain[-1]), []).sum()
    return list(torch.autograd.grad(-tuner.config.reward_multiplier * reward, chain[1:]))


def reference_losses(lab: Lab, tuner: Any, batch: Sequence[Request], chosen: Sequence[int]) -> Tensor:
    """The regression's loss (steps, B) at given steps, written out."""
    guidance = lab.context.sampler.guidance if tuner.config.guided_adjoint else 1.0
    states = reference_states(lab, tuner, batch)
    adjoint = reference_adjoint(lab, tuner, batch, states)
    losses = []
    for index in chosen:
        step = tuner.steps[index]
        trained, base = (
            reference_mean(lab, states[index], step, batch, guidance, adapter) for adapter in (Adapter(), BASE)
        )
        residual = (trained - base.detach()) / step.std + step.std * adjoint[index]
        losses.append((residual**2).flatten(1).sum(1) / 2)
    return torch.stack(losses)


def gradient_of(lab: Lab, loss: Tensor) -> dict[str, Tensor]:
    """By the adapter's parameters; zero where the loss does not reach one."""
    trained = lab.inner.adapter_parameters()
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("final", ["one", "first"])
def test_the_noise_schedule_is_memoryless(gaussian: GaussianModel, final: str) -> None:
    """Whatever the run's eta, training adds the noise of DDPM's posterior, and its sampler is known to the harness."""
    tuner = lab(gaussian, final_alpha=final, eta=0.0).tuner("adjoint-matching")
    for step in tuner.steps:
        cumulative, following = step.alpha**2, step.alpha_next**2
        posterior = (1 - following) / (1 - cumulative) * (1 - cumulative / following)
        assert step.std**2 == pytest.approx(posterior, rel=1e-9, abs=1e-15)
    assert tuner.training_sampler == SamplerConfig(steps=4, final_alpha=final, eta=1.0)


@pytest.mark.parametrize(("guidance", "guided"), [(1.0, False), (4.0, False), (4.0, True)])
def test_adjoint_is_autograd_through_base_steps(tiny_model: StableDiffusion, guidance: float, guided: bool) -> None:
    """At the stored states and noises, the adapter on while sampling and off in the steps that are differentiated."""
    setup = lab(tiny_model, guidance=guidance)
    tuner = setup.tuner("adjoint-matching", guided_adjoint=guided, **ALL)
    batch = requests(tiny_model, 3)
    condition = setup.model.condition([r.prompt.text for r in batch])
    _, terminal, states = tuner.trajectory(batch, condition)
    points = tuner.adjoint(states, terminal, condition)
    expected_states = reference_states(setup, tuner, batch)
    expected = reference_adjoint(setup, tuner, batch, expected_states)
    for point, state, adjoint in zip(points, expected_states[:-1], expected, strict=True):
        assert distance({"x": point.state}, {"x": state}) < 1e-10
        assert distance({"a": point.adjoint}, {"a": adjoint}) < 1e-10
    if guidance != 1.0:
        other = setup.tuner("adjoint-matching", guided_adjoint=not guided, **ALL)
        changed = reference_adjoint(setup, other, batch, expected_states)
        assert distance({"a": changed[0]}, {"a": expected[0]}) > 1e-3


def test_adjoint_at_the_base_is_plain_autograd(tiny_model: StableDiffusion) -> None:
    """With an adapter that changes nothing, it is the gradient of the shared sampling loop by its own states."""
    setup = lab(tiny_model, adapter=0.0, guidance=1.0)
    tuner = setup.tuner("adjoint-matching", **ALL)
    batch = requests(tiny_model, 2)
    condition = setup.model.condition([r.prompt.text for r in batch])
    visited: list[Tensor] = []

    def observe(step: Step, x: Tensor, policy: Transition, x_next: Tensor) -> None:
        visited.append(x_next)

    noise = step_noise(setup.inner, batch, setup.context.randomness, "trajectory")
    x_T = initial_latents(setup.inner, batch)
    x_0 = sample(
        setup.inner, x_T, condition, tuner.sampler, gradient_steps=len(tuner.steps), noise=noise, observe=observe
    )
    reward = QuadraticReward(CPU)(setup.inner.decode(x_0), []).sum()
    expected = torch.autograd.grad(-LAMBDA * reward, visited)
    _, terminal, states = tuner.trajectory(batch, condition)
    for point, adjoint in zip(tuner.adjoint(states, terminal, condition), expected, strict=True):
        assert distance({"a": point.adjoint}, {"a": adjoint}) < 1e-10


@pytest.mark.parametrize(("guidance", "guided"), [(1.0, False), (4.0, True)])
@pytest.mark.parametrize("final", ["one", "first"])
def test_at_the_base_it_is_the_pathwise_gradient(
    tiny_model: StableDiffusion, guidance: float, guided: bool, final: str
) -> None:
    """There the change is zero, so that the regression's gradient is lambda times that of -r through the noisy chain.

    Divided by the number of noisy steps, whose mean is taken; a step without noise keeps its parameters.
    """
    setup = lab(tiny_model, adapter=0.0, guidance=guidance, final_alpha=final)
    tuner = setup.tuner("adjoint-matching", batch_size=3, guided_adjoint=guided, **ALL)
    batch = requests(tiny_model, 3)
    x = torch.stack([r.noise for r in batch]).double()
    noise = step_noise(setup.inner, batch, setup.context.randomness, "trajectory")
    for step in tuner.steps:
        adapter = Adapter() if step.std > 0 else BASE
        x = reference_mean(setup, x, step, batch, guidance, adapter)
        x = x + step.std * noise(step) if step.std > 0 else x
    reward = QuadraticReward(CPU)(setup.inner.decode(x), []).mean()
    noisy = 3 if final == "one" else 4
    expected = gradient_of(setup, -LAMBDA / noisy * reward)
    assert_close(gradients(tuner, batch), expected)


@pytest.mark.parametrize(("guidance", "guided"), [(1.0, False), (4.0, False), (4.0, True)])
def test_loss_away_from_the_base(tiny_model: StableDiffusion, guidance: float, guided: bool) -> None:
    """The gradient, and the loss that is reported, are those of the regression written out at the drawn steps."""
    setup = lab(tiny_model, guidance=guidance)
    batch = requests(tiny_model, 3)
    tuner = setup.tuner(
        "adjoint-matching", batch_size=3, stored_steps=2, reward_multiplier=LAMBDA, guided_adjoint=guided
    )
    chosen = tuner.choose(setup.context.randomness.child("iteration", batch[0].noise_id))
    expected = gradient_of(setup, reference_losses(setup, tuner, batch, chosen).mean())
    assert_close(gradients(tuner, batch), expected)
    assert len(chosen) == 2


@pytest.mark.parametrize("model", ["gaussian", "tiny_model"])
@pytest.mark.parametrize("null", ["constant reward", "lambda 0"])
def test_no_reward_no_gradient(model: str, null: str, request: pytest.FixtureRequest) -> None:
    """At the base weights the gradient is zero exactly, guidance or not."""
    found: Any = request.getfixturevalue(model)
    reward, settings = (
        (ConstantReward, {}) if null == "constant reward" else (QuadraticReward, {"reward_multiplier": 0})
    )
    still = gradients(lab(found, reward, adapter=0.0).tuner("adjoint-matching", **settings), requests(found, 4))
    assert still
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in still.values())


def test_no_reward_leads_back_to_the_base(gaussian: GaussianModel) -> None:
    """Away from the base weights a constant reward leaves the divergence from the base, which falls."""
    tuner = lab(gaussian, ConstantReward).tuner(
        "adjoint-matching", optimizer={"learning_rate": 1e-2}, clip_quantile=None
    )
    losses = [tuner.iterate(requests(gaussian, 4))["loss"] for _ in range(8)]
    assert 0 < losses[-1] < losses[0] / 2


def tilting_bias(setup: Lab, tuner: Any) -> Tensor:
    """The biases (T, 3, 1, 1) that move every noisy step's mean by s^2 * lambda * dE[r]/dx_{t-1}: the optimum.

    The reward and the steps are linear, so that log E_base[exp(lambda * r) | x_t] is linear in x_t, and N(mu, s^2)
    times the exponential of a linear function is N(mu + s^2 * slope, s^2).
    """
    slope, rows = LAMBDA / 30 * WEIGHTS.view(3, 1, 1), []
    origin, ones = torch.zeros(1, 3, 1, 1, dtype=torch.float64), torch.ones(1, 3, 1, 1, dtype=torch.float64)
    for step in reversed(tuner.steps):
        per_noise = math.sqrt(step.sigma_next**2 - step.std**2) - step.alpha_next * step.sigma / step.alpha
        rows.append(step.std**2 * slope / per_noise)
        batch = requests(setup.inner, 1)
        at_one, at_zero = (reference_mean(setup, x, step, batch, 1.0, BASE)[0] for x in (ones, origin))
        slope = (at_one - at_zero) * slope
    return torch.stack(rows[::-1])


@pytest.mark.parametrize("final", ["one", "first"])
@pytest.mark.parametrize("steps", [3, 10])
def test_the_tilted_gaussian_is_the_fixed_point(final: str, steps: int) -> None:
    """Where the model is the base tilted by a linear reward, loss and gradient are zero at any number of steps.

    The mean of the pictures has moved by lambda * w times the variance that the noise gives, and the variance has not
    changed; the tilt of the pictures themselves has the whole variance, of which x_T holds less than a hundredth.
    """
    sampler = SamplerConfig(steps=steps, guidance=1.0, final_alpha=final, eta=1.0)
    setup = lab(
        TimedGaussian(sampler), LinearReward, adapter=0.0, steps=steps, guidance=1.0, final_alpha=final, micro_batch=64
    )
    tuner = setup.tuner("adjoint-matching", stored_steps=None, reward_multiplier=LAMBDA / 30)
    start = tuner.iterate(requests(setup.inner, 4))
    base = moments(setup.inner, sampler, BASE)
    setup.inner.adapter_parameters()["bias"].data = tilting_bias(setup, tuner)
    tilted = moments(setup.inner, sampler, Adapter())
    end = tuner.iterate(requests(setup.inner, 4))
    assert end["loss"] < 1e-20 * start["loss"]
    assert end["gradient_norm"] < 1e-10 * start["gradient_norm"]
    torch.testing.assert_close(tilted.mean - base.mean, LAMBDA / 30 * WEIGHTS * base.injected, rtol=1e-10, atol=0)
    torch.testing.assert_close(tilted.mean - base.mean, LAMBDA / 30 * WEIGHTS * base.variance, rtol=1e-2, atol=0)
    torch.testing.assert_close(tilted.variance, base.variance, rtol=1e-12, atol=0)


def test_large_losses_are_dropped(tiny_model: StableDiffusion) -> None:
    """From the second iteration on, terms above the average quantile of the earlier iterations count as zero."""
    setup = lab(tiny_model)
    settings = {"batch_size": 4, "reward_multiplier": LAMBDA, "stored_steps": None, "clip_quantile": 0.5}
    tuner = setup.tuner("adjoint-matching", **settings)
    noisy, first, second = [0, 1, 2], requests(tiny_model, 4, seed=0), requests(tiny_model, 4, seed=1)
    losses = [reference_losses(setup, tuner, batch, noisy) for batch in (first, second)]
    medians = [float(loss.detach().sqrt().flatten().sort().values[5:7].mean()) for loss in losses]
    kept = losses[1].detach().sqrt() <= medians[0]
    expected = [gradient_of(setup, loss) for loss in (losses[0].mean(), losses[1][kept].sum() / 12)]
    assert 0 < kept.sum() < 12
    assert_close(gradients(tuner, first), expected[0])
    assert tuner.threshold == pytest.approx(medians[0], rel=1e-9)
    metrics = tuner.iterate(second)
    found = {name: p.grad.clone() for name, p in setup.inner.adapter_parameters().items() if p.grad is not None}
    assert_close(found, expected[1])
    assert metrics["clipped"] == pytest.approx(1 - float(kept.double().mean()))
    assert tuner.threshold == pytest.approx(0.9 * medians[0] + 0.1 * medians[1], rel=1e-9)


def test_steps_are_drawn_from_both_halves(gaussian: GaussianModel) -> None:
    """Half from the first 60 % of the noisy steps, half from the rest, each of them some time; null takes all."""
    setup = lab(gaussian, steps=10)
    tuner = setup.tuner("adjoint-matching", stored_steps=5)
    drawn = [tuner.choose(setup.context.randomness.child(i)) for i in range(60)]
    assert all(chosen == sorted(set(chosen)) and len(chosen) == 5 for chosen in drawn)
    assert {sum(index < 5 for index in chosen) for chosen in drawn} == {2}
    assert {index for chosen in drawn for index in chosen} == set(range(9))  # the tenth step has no noise
    everything = setup.tuner("adjoint-matching", stored_steps=None)
    assert everything.choose(setup.context.randomness) == list(range(9))


def test_results_do_not_depend_on_micro_batches(tiny_model: StableDiffusion) -> None:
    """Two iterations, the clipping of the second included, give the same parameters for every split."""
    after = []
    for size in (16, 2):
        setup = lab(tiny_model, micro_batch=size)
        tuner = setup.tuner(
            "adjoint-matching", batch_size=5, clip_quantile=0.3, optimizer={"learning_rate": 1e-2, "weight_decay": 0.0}
        )
        clipped = [tuner.iterate(requests(tiny_model, 5, seed))["clipped"] for seed in range(2)]
        assert clipped[0] == 0 < clipped[1]
        after.append({name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()})
    assert_close(after[1], after[0], 1e-9)


@pytest.mark.parametrize(("guidance", "guided"), [(1.0, True), (4.0, True), (4.0, False)])
@pytest.mark.parametrize("stored", [2, None])
def test_plan_is_what_the_meter_counts(
    tiny_model: StableDiffusion, guidance: float, guided: bool, stored: int | None
) -> None:
    """With and without guidance in the adjoint."""
    setup = lab(tiny_model, guidance=guidance, micro_batch=2)
    tuner = setup.tuner("adjoint-matching", batch_size=3, stored_steps=stored, guided_adjoint=guided)
    tuner.iterate(requests(tiny_model, 3))
    assert asdict(setup.meter.cost) == asdict(tuner.planned_cost().expected) == asdict(tuner.planned_cost().maximal)


def test_bad_settings_are_refused(gaussian: GaussianModel) -> None:
    """More steps than either half has, and a chain without a noisy step."""
    for stored in (4, 9):
        with pytest.raises(UserError, match="give null for all"):
            lab(gaussian).tuner("adjoint-matching", stored_steps=stored)
    assert lab(gaussian).tuner("adjoint-matching", stored_steps=3).stored == 3
    with pytest.raises(UserError, match="at least one noisy step"):
        lab(gaussian, steps=1, final_alpha="one").tuner("adjoint-matching")


def test_a_reward_that_is_no_number_diverges(gaussian: GaussianModel) -> None:
    """Nothing has moved then, the clipping's threshold included."""
    setup = lab(gaussian, BrokenReward)
    tuner = setup.tuner("adjoint-matching", optimizer={"learning_rate": 1e-2})
    before = {name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()}
    with pytest.raises(Diverged, match="reward"):
        tuner.iterate(requests(gaussian, 4))
    assert all(torch.equal(p, before[name]) for name, p in setup.inner.adapter_parameters().items())
    assert tuner.threshold == math.inf
