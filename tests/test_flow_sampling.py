"""Flow models in the one sampling loop: diffusers' schedules and Euler steps, and a stochastic step that is exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from harness.api import Adapter, Prediction, Randomness, SamplerConfig, UserError
from harness.sampling import sample, schedule, transition
from models.flux import Flux
from models.gaussian import GaussianModel
from models.stable_diffusion_3 import StableDiffusion3
from tests.fakes import CPU
from tests.flow_gaussian import FlowGaussian
from tests.models.tiny_pipelines import save_flux, save_sd3
from tests.timed_gaussian import moments

ETAS = [0.0, 0.3, 1.0]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion3:
    """With the shift of 3."""
    return StableDiffusion3(str(save_sd3(tmp_path_factory.mktemp("sd3") / "p", with_t5=False)), CPU)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Flux:
    """With dynamic shifting; 16 tokens."""
    return Flux(str(save_flux(tmp_path_factory.mktemp("flux") / "p", guidance_embeds=True)), CPU)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_static_shift_by_hand(sd3: StableDiffusion3, steps: int) -> None:
    """From pure noise down to the shifted 1/1000, evenly, and shifted once more: what the pipeline's scheduler does."""
    least = 3 * 0.001 / (1 + 2 * 0.001)
    even = np.linspace(1, least, steps)
    expected = 1000 * 3 * even / (1 + 2 * even)
    np.testing.assert_allclose(sd3.timesteps(SamplerConfig(steps=steps)), expected, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize(("side", "shift"), [(8, 0.5 - 240 * 0.65 / 3840), (32, 0.5), (128, 1.15)])
def test_dynamic_shift_by_hand(flux: Flux, steps: int, side: int, shift: float) -> None:
    """From 1 to 1/steps, evenly, through exp(mu) / (exp(mu) + 1/s - 1), mu by the number of tokens."""
    even = np.linspace(1, 1 / steps, steps)
    expected = 1000 * math.exp(shift) / (math.exp(shift) + (1 / even - 1))
    flux.latent_shape = (4, side, side)
    np.testing.assert_allclose(flux.timesteps(SamplerConfig(steps=steps)), expected, rtol=1e-6)
    flux.latent_shape = (4, 8, 8)


@pytest.mark.parametrize("setting", [{"spacing": "leading"}, {"final_alpha": "first"}])
def test_conventions_of_discrete_timesteps_are_refused(flux: Flux, setting: dict[str, str]) -> None:
    """They would do nothing; the user is told."""
    with pytest.raises(UserError, match="is a flow model"):
        schedule(flux, SamplerConfig.model_validate(setting))


def test_levels_end_at_the_clean_latent(flux: Flux) -> None:
    """Real timesteps; alpha + sigma = 1 at each, the last step is not noisy whatever eta is."""
    steps = schedule(flux, SamplerConfig(steps=7, eta=1.0))
    assert [step.t for step in steps] == flux.timesteps(SamplerConfig(steps=7))
    assert all(step.alpha + step.sigma == pytest.approx(1, abs=1e-12) for step in steps)
    assert (steps[0].alpha, steps[0].sigma) == (0, 1)
    assert (steps[-1].alpha_next, steps[-1].sigma_next, steps[-1].std) == (1, 0, 0)
    assert all(step.std > 0 for step in steps[:-1])


def test_deterministic_steps_are_those_of_euler() -> None:
    """One is x + (s_next - s) * velocity, as diffusers' scheduler steps; along a whole chain."""
    model, config = FlowGaussian(), SamplerConfig(steps=9, guidance=1.0)
    condition = model.condition(["a", "a"])
    x = Randomness(0).normal((2, 3, 1, 1), "x", dtype=torch.float64)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 9 for i in range(9)])
    theirs = x
    for t, step in zip(scheduler.timesteps, schedule(model, config), strict=True):
        assert step.t == pytest.approx(t.item(), rel=1e-6)
        velocity = model.denoise(theirs, step.t, condition, Adapter())
        theirs = scheduler.step(velocity, t, theirs).prev_sample
    torch.testing.assert_close(sample(model, x, condition, config), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", [3, 20])
def test_a_step_keeps_the_marginals(eta: float, steps: int) -> None:
    """Given x0, a step from N(alpha*x0, sigma^2) ends at N(alpha_next*x0, sigma_next^2), whatever its own noise is."""
    x0, noise = torch.tensor([0.7, -1.2], dtype=torch.float64)
    for step in schedule(FlowGaussian(), SamplerConfig(steps=steps, eta=eta)):
        policy = transition(Prediction(noise, x0, noise, noise), step)
        no_noise = transition(Prediction(0 * noise, x0, noise, noise), step)
        assert no_noise.mean.item() == pytest.approx(step.alpha_next * x0.item(), abs=1e-12)
        of_noise = (policy.mean - no_noise.mean).item() / noise.item()
        assert of_noise**2 + policy.std**2 == pytest.approx(step.sigma_next**2, abs=1e-12)


@pytest.mark.parametrize("steps", [3, 20])
def test_eta_1_reverses_the_noising(steps: int) -> None:
    """It is x_next given x_t and x0 where x_t = (alpha/alpha_next)*x_next + noise: conditioned by covariances."""
    x0, noise = torch.tensor([0.7, -1.2], dtype=torch.float64)
    for step in schedule(FlowGaussian(), SamplerConfig(steps=steps, eta=1.0)):
        covariance = step.alpha / step.alpha_next * step.sigma_next**2
        regression = covariance / step.sigma**2
        policy = transition(Prediction(noise, x0, noise, noise), step)
        assert policy.std**2 == pytest.approx(step.sigma_next**2 - regression * covariance, abs=1e-12)
        expected = step.alpha_next * x0 + regression * step.sigma * noise
        assert policy.mean.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("eta", ETAS)
def test_chains_reach_the_data(eta: float) -> None:
    """With the exact velocity, mean and deviation of a chain tend to the data's as steps become small."""
    errors = []
    for steps in (50, 100, 200):
        reached = moments(FlowGaussian(), SamplerConfig(steps=steps, guidance=1.0, eta=eta), Adapter())
        errors.append(max(abs(reached.mean[0].item() - 0.3), abs(reached.variance[0].item() ** 0.5 - 0.5)))
    assert errors[2] < 0.02
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]


def test_eta_1_forgets_what_it_started_from() -> None:
    """A chain from alpha 0 with all its noise has no memory of x_T: all variance is that of the steps."""
    model = FlowGaussian()
    for eta, forgets in ((1.0, True), (0.5, False)):
        reached = moments(model, SamplerConfig(steps=5, guidance=1.0, eta=eta), Adapter())
        assert ((reached.variance - reached.injected).abs().max() < 1e-12) == forgets


def test_training_timesteps_are_real_and_uniform(gaussian: GaussianModel) -> None:
    """In (0, 1000] on a flow model; integers from 0 to 999 elsewhere."""
    drawn = torch.tensor([FlowGaussian().draw_timestep(Randomness(0), "t", i) for i in range(4000)])
    assert 0 < drawn.min() < 2
    assert 998 < drawn.max() <= 1000
    assert (drawn != drawn.round()).float().mean() > 0.99
    quarters = torch.histc(drawn, 4, 0, 1000) / 4000
    assert (quarters - 0.25).abs().max() < 0.03
    whole = [gaussian.draw_timestep(Randomness(0), "t", i) for i in range(4000)]
    assert whole == [Randomness(0).integer("t", i, below=1000) for i in range(4000)]


def test_pure_noise_needs_no_division() -> None:
    """At alpha 0 prediction, gradient and step are finite."""
    model = FlowGaussian()
    x = Randomness(0).normal((1, 3, 1, 1), "x", dtype=torch.float64).requires_grad_()
    prediction = model.predict(x, 1000.0, model.condition(["a"]), guidance=3.0, adapter=Adapter())
    torch.testing.assert_close(prediction.noise, x)
    policy = transition(prediction, schedule(model, SamplerConfig(steps=4, eta=1.0))[0])
    assert policy.mean.isfinite().all()
    (gradient,) = torch.autograd.grad(policy.mean.sum(), x)
    assert gradient.isfinite().all()
