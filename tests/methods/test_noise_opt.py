"""Noise optimisation: the gradient at the initial latent, the norm, and the null identity."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.api import BASE, Diverged, Generation, Randomness, Request, SamplerConfig
from harness.sampling import generate
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import BrightnessReward, BrokenReward, Lab, lab, mean_reward, reference_chain, requests


def base(setup: Lab, batch: Sequence[Request], sampler: SamplerConfig) -> Tensor:
    """The base sampler's latents."""
    return generate(setup.inner, batch, Generation(sampler, lora_scale=0.0))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("micro_batch", [2, 16])
def test_no_iterations_are_the_base_sampler(tiny_model: StableDiffusion, eta: float, micro_batch: int) -> None:
    """Bit for bit, with the adapter off; one iteration is not."""
    setup, batch = lab(tiny_model, micro_batch=micro_batch), requests(tiny_model, 3)
    sampler = setup.context.sampler.model_copy(update={"eta": eta})
    expected = base(setup, batch, sampler)
    assert torch.equal(setup.tuner("noise-opt", iterations=0).generate(batch, Generation(sampler)), expected)
    assert not torch.equal(setup.tuner("noise-opt", iterations=1).generate(batch, Generation(sampler)), expected)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_gradient_equals_finite_differences(tiny_model: StableDiffusion, checkpointing: str) -> None:
    """Moving x_T along a random direction changes the reward of the whole chain's picture so; row by row."""
    setup, batch = lab(tiny_model, checkpointing=checkpointing), requests(tiny_model, 2)  # type: ignore[arg-type]
    sampler, h = setup.context.sampler, 1e-4
    x = torch.stack([r.noise for r in batch]).double()
    gradient = setup.tuner("noise-opt").gradient(x, batch, sampler)
    direction = Randomness(3).normal(x.shape, "direction", dtype=x.dtype)
    with torch.no_grad():
        for row, request in enumerate(batch):
            here, along = x[row : row + 1], direction[row : row + 1]
            ends = [
                reference_chain(tiny_model, [request], sampler, [BASE] * 4, x=here + s * h * along) for s in (1, -1)
            ]
            ahead, behind = (float(mean_reward(setup, latents, [request])) for latents in ends)
            assert float((gradient[row] * direction[row]).sum()) == pytest.approx((ahead - behind) / (2 * h), rel=1e-5)
    assert all(p.grad is None for p in tiny_model.adapter_parameters().values())


def test_updates_are_adams_on_a_sphere(gaussian: GaussianModel) -> None:
    """On the Gaussian, where x_0 is affine in x_T, three updates are Adam's by hand, each rescaled."""
    setup, batch = lab(gaussian, guidance=1.0), requests(gaussian, 3)
    sampler, rate = setup.context.sampler, 0.1
    ends = [torch.full((1, 3, 1, 1), value, dtype=torch.float64) for value in (0.0, 1.0)]
    zero, one = (reference_chain(gaussian, batch[:1], sampler, [BASE] * 4, x=end) for end in ends)
    slope, offset = one - zero, zero
    x = torch.stack([r.noise for r in batch]).double()
    norms = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(1, 4):
        gradient = 2 * (slope * x + offset - 0.8) / 3 * slope
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        x = x - rate * (first / (1 - 0.9**i)) / ((second / (1 - 0.999**i)).sqrt() + 1e-8)
        x = x * norms / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    actual = setup.tuner("noise-opt", iterations=3, learning_rate=rate).optimise(batch, sampler)
    torch.testing.assert_close(actual, x, rtol=1e-9, atol=1e-9)


def test_norms_are_kept_and_rewards_rise(tiny_model: StableDiffusion) -> None:
    """After some updates every latent has its first norm, another direction, and a better picture."""
    setup, batch = lab(tiny_model), requests(tiny_model, 3)
    sampler = setup.context.sampler
    before = torch.stack([r.noise for r in batch]).double()
    after = setup.tuner("noise-opt", iterations=8).optimise(batch, sampler)
    torch.testing.assert_close(after.flatten(1).norm(dim=1), before.flatten(1).norm(dim=1), rtol=1e-12, atol=0)
    assert float((after - before).abs().max()) > 0.1
    optimised = reference_chain(tiny_model, batch, sampler, [BASE] * 4, x=after)
    assert mean_reward(setup, optimised, batch) > mean_reward(setup, base(setup, batch, sampler), batch)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_costs_what_it_planned(tiny_model: StableDiffusion, checkpointing: str, guidance: float) -> None:
    """The meter shows the plan of a picture, times the pictures, recomputed rows included."""
    setup = lab(tiny_model, checkpointing=checkpointing, guidance=guidance, micro_batch=2)  # type: ignore[arg-type]
    tuner = setup.tuner("noise-opt", iterations=2)
    tuner.generate(requests(tiny_model, 3), Generation(setup.context.sampler))
    assert setup.meter.cost == tuner.planned_cost().expected * 3
    assert (setup.meter.cost.recomputed_rows > 0) == (checkpointing == "on")


def test_pictures_do_not_depend_on_their_batch(tiny_model: StableDiffusion) -> None:
    """One by one and in another order: the same latents; without autograd around, too."""
    batch, settings = requests(tiny_model, 3), {"iterations": 2}
    setup, alone = lab(tiny_model), lab(tiny_model, micro_batch=1)
    generation = Generation(setup.context.sampler)
    whole = setup.tuner("noise-opt", **settings).generate(batch, generation)
    with torch.no_grad():
        single = alone.tuner("noise-opt", **settings).generate(batch[::-1], generation).flip(0)
    torch.testing.assert_close(single, whole, rtol=1e-9, atol=1e-9)
    assert not whole.requires_grad


def test_what_is_refused(gaussian: GaussianModel) -> None:
    """A reward without a gradient, and one that is not finite."""
    for reward, error in ((BrightnessReward, RuntimeError), (BrokenReward, Diverged)):
        setup = lab(gaussian, reward)
        with pytest.raises(error):
            setup.tuner("noise-opt").generate(requests(gaussian, 2), Generation(setup.context.sampler))
