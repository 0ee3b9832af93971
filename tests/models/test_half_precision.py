"""A short denoiser with a float32 adapter: gradients are float32, and those of the long one within its rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.api import Adapter, AdapterConfig, Randomness, SamplerConfig
from harness.sampling import Transition, log_probability, sample
from models.stable_diffusion import StableDiffusion
from tests.fakes import CPU, distance


def gradients(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the guided prediction's square, by the adapter's parameters."""
    model = StableDiffusion(str(directory), CPU, dtype)
    model.add_adapter(AdapterConfig(rank=2, alpha=6.0), Randomness(3))
    parameters = model.adapter_parameters()
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(0.3 * Randomness(4).normal(parameter.shape, name))
    x = Randomness(0).normal((2, *model.latent_shape), "x")
    noise = model.predict(x, 500, model.condition(["cat", "a dog"]), guidance=3.0, adapter=Adapter()).noise
    assert noise.dtype == torch.float32
    found = torch.autograd.grad(noise.square().mean(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


# Measured: 0.046 and 0.0056, eight times apart as the roundings of the two are; the tolerance is about twice that.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.0125)])
def test_gradients_are_close_to_those_in_float32(
    pipeline_directory: Path, dtype: torch.dtype, tolerance: float
) -> None:
    """Float32, and near; the whole gradient's relative error is the rounding of the denoiser's."""
    found, expected = gradients(pipeline_directory, dtype), gradients(pipeline_directory, torch.float32)

    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert 0 < distance(found, expected) < tolerance


def test_log_probabilities_of_a_short_denoiser_tell_small_ratios_apart(pipeline_directory: Path) -> None:
    """Policy gradients clip ratios at 1e-4: a change of the adapter that moves one by 1e-5 must be seen."""
    model = StableDiffusion(str(pipeline_directory), CPU, torch.bfloat16)
    taken: list[tuple[Tensor, Transition]] = []
    sampler = SamplerConfig(steps=2, eta=1.0, guidance=1.0)
    x = sample(
        model,
        Randomness(0).normal((1, *model.latent_shape), "x"),
        model.condition(["cat"]),
        sampler,
        noise=lambda step: Randomness(1).normal((1, *model.latent_shape), step.index),
        observe=lambda step, before, policy, after: taken.append((after, policy)),
    )
    action, policy = taken[0]
    before = log_probability(action, policy)
    after = log_probability(action, replace(policy, mean=policy.mean + 1e-5 * (action - policy.mean)))
    assert x.dtype == before.dtype == torch.float32
    assert 3e-6 < float(after - before) < 3e-5  # 1e-5 times the mean square of noise of deviation 1
