"""The sampling loop against diffusers' DDIM, against closed forms, and against its own promises."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from harness.api import Adapter, Generation, Randomness, SamplerConfig
from harness.sampling import Transition, generate, log_probability, sample, schedule, step_noise, timesteps, transition
from models.gaussian import GaussianModel
from tests.fakes import lab, requests

Spacing = Literal["trailing", "leading"]
Final = Literal["one", "first"]
Output = Literal["epsilon", "v_prediction"]
CONVENTIONS = [("trailing", "one"), ("leading", "one"), ("leading", "first"), ("trailing", "first")]


def diffusers_scheduler(model: GaussianModel, config: SamplerConfig) -> DDIMScheduler:
    """Diffusers' scheduler of the same conventions, with alphas in double precision."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=config.final_alpha == "one",
        steps_offset=1,
        timestep_spacing=config.spacing,
        prediction_type=model.prediction_type,
    )
    exact = torch.tensor([model.alpha_sigma(t)[0] ** 2 for t in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=1e-5, atol=0)
    scheduler.alphas_cumprod = exact
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64) if config.final_alpha == "one" else exact[0]
    scheduler.set_timesteps(config.steps)
    return scheduler


@pytest.mark.parametrize(("spacing", "final"), CONVENTIONS)
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_visits_the_timesteps_of_diffusers(spacing: Spacing, final: Final, steps: int) -> None:
    """Both spacings visit what diffusers' scheduler visits, in its order."""
    config = SamplerConfig(steps=steps, spacing=spacing, final_alpha=final)
    scheduler = diffusers_scheduler(GaussianModel(), config)
    assert timesteps(1000, config) == scheduler.timesteps.tolist()


@pytest.mark.parametrize(("spacing", "final"), CONVENTIONS)
@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("output", ["epsilon", "v_prediction"])
def test_steps_equal_those_of_diffusers(spacing: Spacing, final: Final, steps: int, eta: float, output: Output) -> None:
    """Each step's mean, deviation and sample are those of DDIMScheduler when the network says the same."""
    model = GaussianModel()
    model.prediction_type = output
    config = SamplerConfig(steps=steps, spacing=spacing, final_alpha=final, eta=eta, guidance=1.0)
    scheduler = diffusers_scheduler(model, config)
    x = Randomness(0).normal((5, 3, 1, 1), "x", dtype=torch.float64)
    noise = Randomness(0).normal((5, 3, 1, 1), "noise", dtype=torch.float64)
    condition = model.condition(["a"] * 5)
    for step in schedule(model, config):
        network = model.denoise(x, step.t, condition, Adapter())
        policy = transition(model.predict(x, step.t, condition, guidance=1.0, adapter=Adapter()), step)
        theirs = scheduler.step(network, step.t, x, eta=eta, variance_noise=noise).prev_sample
        their_mean = scheduler.step(network, step.t, x, eta=eta, variance_noise=0 * noise).prev_sample
        torch.testing.assert_close(policy.mean, their_mean, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(policy.mean + policy.std * noise, theirs, rtol=1e-11, atol=1e-11)
        x = theirs


def test_last_level_differs_between_spacings() -> None:
    """Sigma of the last step of 50 is 0.133 with trailing and 0.0413 with leading spacing."""
    model = GaussianModel()
    last = {s: schedule(model, SamplerConfig(steps=50, spacing=s))[-1].sigma for s in ("trailing", "leading")}
    assert last["trailing"] == pytest.approx(0.133, abs=5e-4)
    assert last["leading"] == pytest.approx(0.0413, abs=5e-5)


def test_deviation_of_the_last_step() -> None:
    """The step onto a clean latent has no noise at any eta; the one onto the first level does."""
    model = GaussianModel()
    assert schedule(model, SamplerConfig(eta=1.0, final_alpha="one"))[-1].std == 0
    assert schedule(model, SamplerConfig(eta=1.0, final_alpha="first"))[-1].std > 0
    assert all(step.std == 0 for step in schedule(model, SamplerConfig(eta=0.0, final_alpha="first")))


def test_log_probability_is_the_mean_density_of_a_normal() -> None:
    """Log-densities are torch.distributions' averaged, not summed, over latent dimensions."""
    mean, x = Randomness(1).normal((2, 6, 4, 3, 3), "pair", dtype=torch.float64)
    expected = torch.distributions.Normal(mean, 0.37).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(log_probability(x, Transition(mean, 0.37)), expected, rtol=1e-12, atol=1e-12)


def test_a_step_without_noise_has_no_log_probability() -> None:
    """A deterministic step is no action."""
    with pytest.raises(ValueError, match="no action"):
        log_probability(torch.zeros(1, 3, 1, 1), Transition(torch.zeros(1, 3, 1, 1), 0.0))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_many_steps_reach_the_data(eta: float) -> None:
    """With the exact denoiser, samples have the data's mean and standard deviation."""
    model = GaussianModel(mean=0.3, std=0.5)
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn((6_000, 3, 1, 1), generator=generator, dtype=torch.float64)

    config = SamplerConfig(steps=1000, eta=eta, guidance=1.0)
    with torch.no_grad():
        x = sample(model, normal(), model.condition(["a"] * 6_000), config, noise=lambda step: normal())
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.015)


def test_noisy_sampling_needs_noise(gaussian: GaussianModel) -> None:
    """Without the noise of its steps a stochastic chain is refused; nothing is drawn from a global generator."""
    x = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="needs the noise"):
        sample(gaussian, x, gaussian.condition(["a"]), SamplerConfig(eta=0.5))


def test_noise_belongs_to_requests_not_to_rows(gaussian: GaussianModel) -> None:
    """Permuted requests give the permuted pictures, bit for bit, and so does any split into batches."""
    batch = requests(gaussian, 6)
    order = [3, 1, 5, 0, 4, 2]
    generation = Generation(SamplerConfig(steps=5, eta=1.0, guidance=1.0))
    straight = generate(gaussian, batch, generation)
    assert torch.equal(generate(gaussian, [batch[i] for i in order], generation), straight[order])
    parts = [generate(gaussian, batch[:1], generation), generate(gaussian, batch[1:], generation)]
    assert torch.equal(torch.cat(parts), straight)


def test_noise_differs_between_steps_pictures_prompts_and_purposes(gaussian: GaussianModel) -> None:
    """No two draws of a chain coincide."""
    steps = schedule(gaussian, SamplerConfig(steps=3, eta=1.0))
    draws = [
        step_noise(gaussian, requests(gaussian, 4), Randomness(seed), purpose)(step)
        for seed, purpose, step in itertools.product((0, 1), ("step", "rollout"), steps)
    ]
    values = torch.cat(draws).flatten().tolist()
    assert len(set(values)) == len(values)


def test_adapter_can_change_from_step_to_step(gaussian: GaussianModel) -> None:
    """`lora_steps` uses the base model before the last steps; 0 is the base, T is the adapter throughout."""
    lab(gaussian)
    batch = requests(gaussian, 3)
    sampler = SamplerConfig(steps=4, guidance=1.0)
    full = generate(gaussian, batch, Generation(sampler))
    base = generate(gaussian, batch, Generation(sampler, lora_scale=0.0))
    assert torch.equal(generate(gaussian, batch, Generation(sampler, lora_steps=4)), full)
    assert torch.equal(generate(gaussian, batch, Generation(sampler, lora_steps=0)), base)
    late = generate(gaussian, batch, Generation(sampler, lora_steps=1))
    assert not torch.equal(late, full)
    assert not torch.equal(late, base)


def test_stop_and_observe_show_the_chain(gaussian: GaussianModel) -> None:
    """Observers see each step once, in order; a stopped chain ends where the observed one was."""
    x = Randomness(0).normal((2, 3, 1, 1), "x", dtype=torch.float64)
    config = SamplerConfig(steps=4, guidance=1.0)
    seen: list[tuple[int, Tensor, Tensor]] = []
    condition = gaussian.condition(["a", "b"])
    end = sample(gaussian, x, condition, config, observe=lambda s, a, policy, b: seen.append((s.index, a, b)))
    assert [index for index, _, _ in seen] == [0, 1, 2, 3]
    assert all(torch.equal(before[2], after[1]) for before, after in itertools.pairwise(seen))
    assert torch.equal(end, seen[-1][2])
    assert torch.equal(sample(gaussian, x, condition, config, stop=2), seen[2][1])


def test_levels_are_those_of_a_variance_preserving_process(gaussian: GaussianModel) -> None:
    """alpha^2 + sigma^2 = 1 at every level of a chain."""
    for step in schedule(gaussian, SamplerConfig(steps=50, spacing="leading", final_alpha="first")):
        assert math.hypot(step.alpha, step.sigma) == pytest.approx(1.0, abs=1e-12)
        assert math.hypot(step.alpha_next, step.sigma_next) == pytest.approx(1.0, abs=1e-12)
