"""Adjoint matching trains the base model into the one that a linear reward tilts it to."""

from __future__ import annotations

import pytest
import torch

from harness.api import BASE, Adapter, DiffusionModel, SamplerConfig
from models.gaussian import GaussianModel
from tests.fakes import lab, requests
from tests.flow_gaussian import FlowGaussian
from tests.methods.test_adjoint_matching import WEIGHTS, LinearReward
from tests.timed_gaussian import TimedGaussian, moments

STRENGTH = 1.5


@pytest.mark.slow
@pytest.mark.parametrize("base", [GaussianModel, FlowGaussian])
@pytest.mark.parametrize(("steps", "final"), [(4, "one"), (10, "one"), (10, "first")])
def test_reaches_the_tilted_gaussian(steps: int, final: str, base: type[DiffusionModel]) -> None:
    """Started at the base, with all noisy steps in each iteration, it moves the mean by lambda * w * v.

    v is the variance that the steps' noise gives: all of the pictures' but the little that x_T keeps. Their variance
    does not change. The adapter has a bias and a gain per step, so that it can be the tilted model; the moments are
    exact, and at the optimum the regression has no noise, so that a thousandth is due to the training's length alone.
    Clipping is off: it compares the losses of all steps, and leaves out terms of the optimum that is tested.
    """
    sampler = SamplerConfig(steps=steps, guidance=1.0, final_alpha=final, eta=1.0)
    model = TimedGaussian(sampler, base())
    setup = lab(model, LinearReward, adapter=0.0, micro_batch=64, steps=steps, guidance=1.0, final_alpha=final)
    optimizer = {"learning_rate": 3e-2, "weight_decay": 0.0, "max_gradient_norm": None}
    settings = {"reward_multiplier": STRENGTH, "batch_size": 8, "stored_steps": None, "clip_quantile": None}
    tuner = setup.tuner("adjoint-matching", optimizer=optimizer, **settings)
    for i in range(300):
        tuner.iterate(requests(model, tuner.requests_per_iteration, seed=i))
    before, tuned = moments(model, sampler, BASE), moments(model, sampler, Adapter())
    torch.testing.assert_close(tuned.mean - before.mean, STRENGTH * WEIGHTS * before.injected, rtol=1e-3, atol=0)
    torch.testing.assert_close(tuned.variance, before.variance, rtol=1e-3, atol=0)
