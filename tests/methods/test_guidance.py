"""Guidance at generation time: gradients, step sizes and recurrences are those of the formulas, written out apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import BASE, Diverged, Generation, Prediction, PredictionType, Randomness, Request, UserError
from harness.sampling import generate, schedule
from methods._guidance import Scene
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import CPU, BrightnessReward, BrokenReward, Lab, QuadraticReward, lab, reference_noise, requests

FAMILY = ("guidance", "freedom", "mpgd")


def base(setup: Lab, batch: Sequence[Request], **sampler: Any) -> Tensor:
    """The base sampler's latents."""
    changed = setup.context.sampler.model_copy(update=sampler)
    return generate(setup.inner, batch, Generation(changed, lora_scale=0.0))


def guided(setup: Lab, method: str, batch: Sequence[Request], eta: float = 0.0, **settings: Any) -> Tensor:
    """The latents of a method of the family."""
    sampler = setup.context.sampler.model_copy(update={"eta": eta})
    latents: Tensor = setup.tuner(method, **settings).generate(batch, Generation(sampler))
    return latents


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_scale_0_is_the_base_sampler(tiny_model: StableDiffusion, method: str, eta: float) -> None:
    """Bit for bit, with the adapter off, for deterministic and stochastic samplers; a larger scale is not."""
    setup, batch = lab(tiny_model), requests(tiny_model, 3)
    expected = base(setup, batch, eta=eta)
    assert torch.equal(guided(setup, method, batch, eta, scale=0.0), expected)
    assert not torch.equal(guided(setup, method, batch, eta, scale=0.1), expected)
    assert not torch.equal(generate(tiny_model, batch, Generation(setup.context.sampler)), base(setup, batch))


def prediction_reward(setup: Lab, x_t: Tensor, t: int, batch: Sequence[Request]) -> tuple[Tensor, Tensor, Tensor]:
    """Noise and clean latent that the base predicts, written out, and the rewards of the decoded clean latents."""
    alpha, sigma = setup.inner.alpha_sigma(t)
    texts = [r.prompt.text for r in batch]
    noise = reference_noise(setup.inner, x_t, t, texts, setup.context.sampler.guidance, BASE)
    x0 = (x_t - sigma * noise) / alpha
    return noise, x0, QuadraticReward(CPU)(setup.inner.decode(x0), [r.prompt for r in batch])


def numerical_gradient(setup: Lab, x_t: Tensor, t: int, batch: Sequence[Request], pixels: Sequence[int]) -> Tensor:
    """Central differences of the first row's reward along some elements of its x_t."""
    h, found = 1e-4, []
    for pixel in pixels:
        moved = x_t.repeat(2, 1, 1, 1)
        moved.view(2, -1)[:, pixel] += torch.tensor([h, -h], dtype=x_t.dtype)
        ahead, behind = prediction_reward(setup, moved, t, [batch[0], batch[0]])[2]
        found.append((ahead - behind) / (2 * h))
    return torch.stack(found)


@torch.no_grad()
def test_universal_guidance_follows_finite_differences(tiny_model: StableDiffusion) -> None:
    """A one-step chain moves by s*sigma^2/alpha times the gradient of r(decode(x0_hat(x_t))), found numerically."""
    setup, batch = lab(tiny_model, steps=1), requests(tiny_model, 1)
    scale, (step,) = 0.3, schedule(tiny_model, setup.context.sampler)
    x_t, pixels = batch[0].noise[None].double(), [0, 37, 101, 200, 255]
    moved = guided(setup, "guidance", batch, scale=scale) - base(setup, batch)
    expected = scale * step.sigma**2 / step.alpha * numerical_gradient(setup, x_t, step.t, batch, pixels)
    torch.testing.assert_close(moved.flatten()[pixels], expected, rtol=1e-5, atol=1e-9)


@torch.no_grad()
def test_freedom_follows_finite_differences(tiny_model: StableDiffusion) -> None:
    """x_0 moves along the numerical gradient, by s*w*rms(eps_c - eps_u) in root mean square."""
    setup, batch = lab(tiny_model, steps=1), requests(tiny_model, 1)
    (step,), texts = schedule(tiny_model, setup.context.sampler), [batch[0].prompt.text]
    x_t, pixels = batch[0].noise[None].double(), [0, 37, 101, 200, 255]
    moved = guided(setup, "freedom", batch, scale=0.2, begin=0.0) - base(setup, batch)
    gradient = numerical_gradient(setup, x_t, step.t, batch, pixels)
    along = moved.flatten()[pixels]
    torch.testing.assert_close(along / along.norm(), gradient / gradient.norm(), rtol=1e-5, atol=1e-7)
    branches = [reference_noise(tiny_model, x_t, step.t, text, 1.0, BASE) for text in (texts, [""])]
    size = (branches[0] - branches[1]).square().mean().sqrt()
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 4.0 * float(size), rel=1e-9)


@torch.no_grad()
def test_mpgd_moves_the_prediction_alone(tiny_model: StableDiffusion) -> None:
    """x_0 moves along the numerical gradient of r(decode(x0)) at the predicted x0, without the denoiser."""
    setup, batch = lab(tiny_model, steps=1), requests(tiny_model, 1)
    (step,) = schedule(tiny_model, setup.context.sampler)
    moved = guided(setup, "mpgd", batch, begin=0.0) - base(setup, batch)
    assert setup.meter.cost.backward_rows == setup.meter.cost.gradient_rows == 0
    assert setup.meter.cost.reward_gradients == 1
    x0 = prediction_reward(setup, batch[0].noise[None].double(), step.t, batch)[1]
    pixels, h, gradient = [0, 37, 101, 200, 255], 1e-4, []
    for pixel in pixels:
        pair = x0.repeat(2, 1, 1, 1)
        pair.view(2, -1)[:, pixel] += torch.tensor([h, -h], dtype=x0.dtype)
        ahead, behind = QuadraticReward(CPU)(tiny_model.decode(pair), [])
        gradient.append((ahead - behind) / (2 * h))
    along, expected = moved.flatten()[pixels], torch.stack(gradient)
    torch.testing.assert_close(along / along.norm(), expected / expected.norm(), rtol=1e-5, atol=1e-7)


def closed_form(model: GaussianModel, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, float]:
    """Noise and clean latent that the Gaussian predicts, and d x0/d x."""
    variance = alpha**2 * model.std**2 + sigma**2
    x0 = model.mean + alpha * model.std**2 * (x - alpha * model.mean) / variance
    return (x - alpha * x0) / sigma, x0, alpha * model.std**2 / variance


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("recurrences", [1, 3])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_whole_chain_in_closed_form(gaussian: GaussianModel, method: str, recurrences: int, eta: float) -> None:
    """Every step, recurrence and draw of noise as the algorithm box has them, on a model without a network."""
    setup, batch, scale = lab(gaussian, guidance=1.0, steps=5), requests(gaussian, 4), 0.4
    x = torch.stack([r.noise for r in batch]).double()
    evaluation = Randomness(0, "evaluation")
    for step in schedule(gaussian, setup.context.sampler.model_copy(update={"eta": eta})):
        inside = method == "guidance" or step.index in (2, 3)  # 0.3 <= index/5 < 0.7
        for again in range(recurrences if inside else 1):
            noise, x0, slope = closed_form(gaussian, x, step.alpha, step.sigma)
            slope = 1.0 if method == "mpgd" else slope
            gradient = -2 * (x0 - 0.8) / 3 * slope
            direction = gradient / gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
            direction = scale * direction * noise.square().mean((1, 2, 3), keepdim=True).sqrt()
            if inside and method == "guidance":
                noise = noise - scale * step.sigma * gradient
                x0 = (x - step.sigma * noise) / step.alpha
            elif inside and method == "mpgd":
                x0 = x0 + direction
            following = step.alpha_next * x0 + (step.sigma_next**2 - step.std**2) ** 0.5 * noise
            if inside and method == "freedom":
                following = following + direction
            if inside and again < recurrences - 1:
                ratio = step.alpha / step.alpha_next
                fresh = evaluation.child(again + 1), "recurrence"
                drawn = [fresh[0].normal((3, 1, 1), fresh[1], r.prompt.id, r.noise_id, step.index) for r in batch]
                variance = (1 - ratio**2) + ratio**2 * step.std**2
                x = ratio * following + variance**0.5 * torch.stack(drawn).double()
        steps_noise = [evaluation.normal((3, 1, 1), "step", r.prompt.id, r.noise_id, step.index) for r in batch]
        x = following + step.std * torch.stack(steps_noise).double()
    actual = guided(setup, method, batch, eta, scale=scale, recurrences=recurrences)
    torch.testing.assert_close(actual, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("recurrences", [1, 2])
def test_costs_what_it_planned(tiny_model: StableDiffusion, method: str, guidance: float, recurrences: int) -> None:
    """The meter shows the plan of a picture, times the pictures."""
    setup = lab(tiny_model, guidance=guidance, micro_batch=2)
    tuner = setup.tuner(method, recurrences=recurrences)
    tuner.generate(requests(tiny_model, 3), Generation(setup.context.sampler))
    assert setup.meter.cost == tuner.planned_cost().expected * 3
    assert tuner.planned_cost().expected == tuner.planned_cost().maximal


@pytest.mark.parametrize("method", FAMILY)
def test_pictures_do_not_depend_on_their_batch(tiny_model: StableDiffusion, method: str) -> None:
    """One by one, in another order, and without autograd around: the same latents; no gradient is left behind."""
    setup, batch = lab(tiny_model), requests(tiny_model, 3)
    whole = guided(setup, method, batch, recurrences=2)
    single = guided(lab(tiny_model, micro_batch=1), method, batch[::-1], recurrences=2).flip(0)
    torch.testing.assert_close(single, whole, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(guided(setup, method, batch, recurrences=2), whole)
    assert not whole.requires_grad
    assert all(p.grad is None for p in tiny_model.adapter_parameters().values())


def test_the_measure_is_that_of_the_noise(gaussian: GaussianModel) -> None:
    """The step is as long as the difference of the noise predictions, whatever the network itself puts out."""
    setup = lab(gaussian)
    tuner = setup.tuner("freedom")
    step, scene = schedule(gaussian, setup.context.sampler)[2], Scene([], gaussian.condition(["a", "b"]), 4.0)
    generator = torch.Generator().manual_seed(0)
    x, noise, other, gradient = torch.randn((4, 2, 3, 1, 1), generator=generator, dtype=torch.float64)
    expected = 4.0 * (noise - other).square().mean((1, 2, 3), keepdim=True).sqrt()
    outputs: dict[PredictionType, Callable[[Tensor], Tensor]] = {
        "epsilon": lambda noise: noise,
        "v_prediction": lambda noise: (noise - step.sigma * x) / step.alpha,
        "sample": lambda noise: (x - step.sigma * noise) / step.alpha,
        "flow": lambda noise: (noise - x) / step.alpha,
    }
    for kind, output in outputs.items():
        setup.model.prediction_type = kind
        measured = tuner.measured(scene, step, Prediction(noise, x, output(noise), output(other)), gradient)
        torch.testing.assert_close(measured.square().mean((1, 2, 3), keepdim=True).sqrt(), expected)
        torch.testing.assert_close(measured / measured.norm(), (measured.abs() * gradient.sign()) / measured.norm())
    assert torch.equal(tuner.measured(scene, step, Prediction(noise, x, noise, other), 0 * gradient), 0 * gradient)


@pytest.mark.parametrize("method", FAMILY)
def test_what_is_refused(gaussian: GaussianModel, method: str) -> None:
    """An empty window, a reward without a gradient, and a reward that is not finite."""
    with pytest.raises(UserError, match="widen the window"):
        lab(gaussian).tuner(method, begin=0.55, end=0.7)
    setup = lab(gaussian)
    late, few = setup.tuner(method, begin=0.5), Generation(setup.context.sampler.model_copy(update={"steps": 1}))
    with pytest.raises(UserError, match="widen the window"):
        late.generate(requests(gaussian, 1), few)
    for reward, error in ((BrightnessReward, RuntimeError), (BrokenReward, Diverged)):
        setup = lab(gaussian, reward)
        with pytest.raises(error):
            setup.tuner(method).generate(requests(gaussian, 2), Generation(setup.context.sampler))
