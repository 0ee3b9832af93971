"""Methods that change weights come close to the best that the adapter can reach, which a direct optimisation finds.

The model is the closed-form Gaussian, the reward concave and quadratic. The gap is that between the base and the best
adapter in expected reward, under the sampler that the method trains with; both ends are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from harness.api import BASE, Adapter, SamplerConfig
from models.gaussian import GaussianModel
from tests.fakes import lab, requests
from tests.timed_gaussian import moments

TARGET = 0.8  # of the quadratic reward in tests/fakes.py


def expected_reward(model: GaussianModel, sampler: SamplerConfig, adapter: Adapter) -> float:
    """E[-(x - 0.8)^2] of the sampler, exactly: minus squared distance of the mean, minus variance."""
    found = moments(model, sampler, adapter)
    return float(-((found.mean - TARGET) ** 2 + found.variance).mean())


def best_reward(model: GaussianModel, sampler: SamplerConfig) -> float:
    """The largest expected reward over the adapter's bias and gain, which are alike in all channels."""

    def loss(values: np.ndarray) -> float:
        bias, gain = (torch.full(model.latent_shape, value, dtype=model.dtype) for value in values.tolist())
        return -expected_reward(model, sampler, Adapter(parameters={"bias": bias, "gain": gain}))

    starts = [(0.0, 0.0), (-0.5, 0.5), (0.5, -0.5)]
    return -min(
        minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}).fun for start in starts
    )


def closed(method: str, iterations: int, seed: int, settings: dict[str, Any]) -> float:
    """Share of the gap that is closed, the mean over the last third of the training: steadier than its end."""
    model = GaussianModel()
    setup = lab(model, adapter=0.0, guidance=1.0, micro_batch=256, seed=seed)
    tuner = setup.tuner(method, optimizer={"learning_rate": 1e-2, "weight_decay": 0.0}, **settings)
    sampler = tuner.training_sampler or setup.context.sampler
    size, found = tuner.requests_per_iteration, []
    for i in range(iterations):
        tuner.iterate(requests(model, size, seed, first=i * size))
        if i >= 2 * iterations / 3:
            found.append(expected_reward(model, sampler, Adapter()))
    base, best = expected_reward(model, sampler, BASE), best_reward(model, sampler)
    return (float(np.mean(found)) - base) / (best - base)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("draft", {}),
        ("draft-k", {"k": 1}),
        ("draft-k", {"k": 2}),
        ("draft-lv", {}),
        ("refl", {"m": 1}),
        ("refl", {"m": 2}),
        ("alignprop", {}),
        ("drtune", {}),
        # The penalty has its default weight; it is small beside this reward's gradient.
        ("draft-plus", {"k": 2}),
        # Tilted by exp(lambda * r) the pictures would be 0.8 with a variance of 3 / (2 lambda), next to nothing. But
        # the steps with noise alone are regressed, and they share one bias and gain, a compromise between them.
        ("adjoint-matching", {"reward_multiplier": 1000.0}),
    ],
)
def test_with_the_gradient_of_the_reward(method: str, settings: dict[str, Any], seed: int) -> None:
    """At least 80 % of the gap in 250 iterations of 16 pictures, and never more than all of it."""
    assert 0.8 <= closed(method, 250, seed, {"batch_size": 16, **settings}) <= 1 + 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_refl_from_steps_too_early(seed: int) -> None:
    """With one-step predictions from the last three of four steps, ReFL closes more than half, but not 80 %.

    It ascends the reward of the predictions, not of the pictures. One bias and gain that serve predictions from three
    levels of noise are not those that serve the chain: mean and variance of the pictures both stop short.
    """
    assert 0.5 <= closed("refl", 250, seed, {"batch_size": 16, "m": 3}) < 0.8


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("method", "iterations", "settings"),
    [
        ("ddpo-sf", 100, {}),
        ("ddpo", 100, {}),
        # Hardly held to the base, so that the reward's maximum is what it goes for.
        ("dpok", 100, {"reward_weight": 100.0, "value_width": 32, "value_learning_rate": 1e-3}),
        ("grpo", 100, {}),
        ("rwr", 60, {}),
        ("raft", 60, {}),
        ("dpo", 60, {"beta": 50.0}),  # the default, 5000, holds it close to the base
        ("d3po", 150, {}),
    ],
)
def test_with_scores_alone(method: str, iterations: int, settings: dict[str, Any], seed: int) -> None:
    """At least 80 % of the gap in iterations of 128 pictures, and never more than all of it.

    RWR and RAFT end nearest to it, at 84 %: an adapter that denoises the chosen pictures best, at all steps alike, is
    not the one whose chain ends in the best pictures. Seeds differ by a point or two.
    """
    assert 0.8 <= closed(method, iterations, seed, {"rollout_size": 128, **settings}) <= 1 + 1e-6
