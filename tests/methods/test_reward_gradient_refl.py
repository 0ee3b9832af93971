"""ReFL's optional pre-training loss, on the base model's own pictures."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from harness.api import BASE, Adapter
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import assert_close, gradients, lab, reference_chain, reference_noise, requests

SATURATED = {"m": 1, "hinge": -100.0}  # No gradient from the reward: what remains is the pre-training loss.


def test_the_pretraining_loss_by_hand(gaussian: GaussianModel) -> None:
    """Without autograd: the noise is missed by what the exact denoiser misses, plus bias + gain*x."""
    setup = lab(gaussian)
    batch = requests(gaussian, 4)
    draws = setup.context.randomness.child("iteration", batch[0].noise_id)
    t = draws.integer("pretraining timestep", below=1000)
    alpha, sigma = gaussian.alpha_sigma(t)
    keys = [(r.prompt.id, r.noise_id) for r in batch]
    noise = torch.stack([draws.normal((3, 1, 1), "pretraining", *key) for key in keys]).double()
    x = alpha * reference_chain(gaussian, batch, setup.context.sampler, [BASE] * 4).detach() + sigma * noise
    bias, gain = (gaussian.adapter_parameters()[name].detach() for name in ("bias", "gain"))
    missed = sigma * (x - alpha * 0.3) / (alpha**2 * 0.25 + sigma**2) + bias + gain * x - noise
    expected = {"bias": 5 * 2 * missed.mean(0) / 3, "gain": 5 * 2 * (missed * x).mean(0) / 3}
    tuner = setup.tuner("refl", batch_size=4, pretraining=5.0, **SATURATED)
    assert_close(gradients(tuner, batch), expected, 1e-12)
    assert tuner.iterate(batch)["loss"] == pytest.approx(5 * float(missed.square().mean()), rel=1e-12)


def test_it_adds_to_the_reward_s_gradient(tiny_model: StableDiffusion) -> None:
    """The gradient of the whole is the sum of its parts, on a UNet whose pictures are guided and whose loss is not."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    plain, alone, both = (
        gradients(setup.tuner("refl", batch_size=2, **settings), batch)
        for settings in ({"m": 1}, {"pretraining": 2.0, **SATURATED}, {"m": 1, "pretraining": 2.0})
    )
    assert_close(both, {name: plain[name] + alone[name] for name in plain}, 1e-12)
    copy = {name: p.detach().clone().requires_grad_() for name, p in tiny_model.adapter_parameters().items()}
    draws = setup.context.randomness.child("iteration", batch[0].noise_id)
    t = draws.integer("pretraining timestep", below=tiny_model.training_timesteps)
    alpha, sigma = tiny_model.alpha_sigma(t)
    keys = [(r.prompt.id, r.noise_id) for r in batch]
    noise = torch.stack([draws.normal(tiny_model.latent_shape, "pretraining", *key) for key in keys]).double()
    x = alpha * reference_chain(tiny_model, batch, setup.context.sampler, [BASE] * 4).detach() + sigma * noise
    found = reference_noise(tiny_model, x, t, [r.prompt.text for r in batch], 1.0, Adapter(parameters=copy))
    expected = torch.autograd.grad(2 * (found - noise).square().mean(), list(copy.values()))
    assert_close(alone, dict(zip(copy, expected, strict=True)))


def test_it_costs_what_it_says(gaussian: GaussianModel) -> None:
    """T guided rows forward for the base's picture and one unguided row with gradient more than without."""
    spent = []
    for pretraining in (0.0, 1.0):
        setup = lab(gaussian)
        tuner = setup.tuner("refl", batch_size=3, m=1, pretraining=pretraining)
        tuner.iterate(requests(gaussian, 3))
        assert asdict(setup.meter.cost) == asdict(tuner.planned_cost().maximal) == asdict(tuner.planned_cost().expected)
        spent.append(setup.meter.cost)
    more = asdict(spent[1] - spent[0])
    assert {kind: count for kind, count in more.items() if count} == {
        "forward_rows": 3 * 2 * 4,
        "gradient_rows": 3,
        "backward_rows": 3,
    }


def test_it_pulls_towards_the_base(gaussian: GaussianModel) -> None:
    """Alone, it brings an adapter that was moved away most of the way back."""
    setup = lab(gaussian, adapter=0.5, guidance=1.0, steps=20)
    values = gaussian.adapter_parameters().values()
    before = float(sum(p.detach().square().sum() for p in values))
    optimizer = {"learning_rate": 2e-2, "weight_decay": 0.0}
    tuner = setup.tuner("refl", batch_size=32, pretraining=1.0, optimizer=optimizer, **SATURATED)
    stream = requests(gaussian, 32 * 100)
    for start in range(0, len(stream), 32):
        tuner.iterate(stream[start : start + 32])
    assert float(sum(p.detach().square().sum() for p in values)) < 0.2 * before
