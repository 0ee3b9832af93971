"""A short denoiser with a float32 adapter: gradients are float32, and those of the long one within its rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.api import Adapter, AdapterConfig, Randomness
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
    x = Randomness(0).normal((2, *model.latent_shape), "x").to(dtype)
    noise = model.predict(x, 500, model.condition(["cat", "a dog"]), guidance=3.0, adapter=Adapter()).noise
    assert noise.dtype == dtype
    found = torch.autograd.grad(noise.float().square().mean(), list(parameters.values()))
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
