"""Reward gradients come close to the best that the adapter can reach, which a direct optimisation finds."""

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
    """E[-(x - 0.8)^2] of the deterministic sampler, exactly: minus squared distance of the mean, minus variance."""
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


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("draft", {}),
        ("draft-k", {"k": 1}),
        ("draft-k", {"k": 2}),
        ("draft-lv", {}),
        ("refl", {"m": 1}),
        ("refl", {"m": 3}),
    ],
)
def test_closes_most_of_the_gap(method: str, settings: dict[str, Any]) -> None:
    """From the base on, at least 80 % of the way in expected reward to the best adapter, and never beyond it."""
    model = GaussianModel()
    setup = lab(model, adapter=0.0, guidance=1.0, micro_batch=64)
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.0}
    tuner = setup.tuner(method, batch_size=16, optimizer=optimizer, **settings)
    sampler = setup.context.sampler
    base, best = expected_reward(model, sampler, BASE), best_reward(model, sampler)
    for i in range(250):
        tuner.iterate(requests(model, tuner.requests_per_iteration, seed=i))
    closed = (expected_reward(model, sampler, Adapter()) - base) / (best - base)
    assert 0.8 <= closed <= 1 + 1e-6
