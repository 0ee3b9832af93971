"""A linear reward on the Gaussian model tilts the sampler's pictures into another known Gaussian."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.api import Generation, Prompt, Reward, SamplerConfig
from harness.sampling import schedule
from models.gaussian import GaussianModel
from tests.fakes import lab, requests

STRENGTH = 6.0


class MeanReward(Reward):
    """The mean pixel: a linear reward."""

    name, version, differentiable, role, unit = "mean", "1", True, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores in the pictures' own precision."""
        return images_BCHW.flatten(1).mean(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


def sampled(model: GaussianModel, sampler: SamplerConfig) -> tuple[float, float]:
    """Mean and variance of each dimension of the stochastic chain's end, where every step is affine plus noise."""
    mean, variance = 0.0, 1.0
    for step in schedule(model, sampler):
        spread = step.alpha**2 * model.std**2 + step.sigma**2
        slope_noise, offset_noise = step.sigma / spread, -step.sigma * step.alpha * model.mean / spread
        slope_x0 = (1 - step.sigma * slope_noise) / step.alpha
        offset_x0 = -step.sigma * offset_noise / step.alpha
        direction = math.sqrt(step.sigma_next**2 - step.std**2)
        slope = step.alpha_next * slope_x0 + direction * slope_noise
        mean = slope * mean + step.alpha_next * offset_x0 + direction * offset_noise
        variance = slope**2 * variance + step.std**2
    return mean, variance


def assert_tilted(potential: str, particles: int, pictures: int) -> None:
    """Mean and variance of pictures drawn by weight against N(m + lambda*v/3, v), within four standard errors.

    The reward is the mean of three dimensions, so each is tilted by lambda/3.
    """
    model = GaussianModel()
    setup = lab(model, MeanReward, guidance=1.0, micro_batch=pictures)
    tuner = setup.tuner("smc", lmbda=STRENGTH, potential=potential, particles=particles, select="draw")
    latents = tuner.generate(requests(model, pictures), Generation(setup.context.sampler))
    mean, variance = sampled(model, setup.context.sampler.model_copy(update={"eta": 1.0}))
    shift, count = STRENGTH * variance / 3, latents.numel()
    error = math.sqrt(variance / count)
    assert shift > 8 * error  # an untilted sample would be seen
    assert float(latents.mean()) == pytest.approx(mean + shift, abs=4 * error)
    assert float(latents.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / count))
