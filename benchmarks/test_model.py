"""Denoiser, sampling, and decoding with a reward's gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from harness.api import Adapter, DiffusionModel, Generation, Request, Reward
from harness.config import RunConfig
from harness.sampling import generate, initial_latents


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.benchmark(group="denoiser, forward")
def test_denoiser_forward(
    benchmark: BenchmarkFixture, model: DiffusionModel, requests: Sequence[Request], rows: int
) -> None:
    """One call without gradient."""
    x, condition = initial_latents(model, requests[:rows]), model.condition([r.prompt.text for r in requests[:rows]])
    benchmark.extra_info["rows"] = rows
    with torch.no_grad():
        benchmark(model.denoise, x, model.training_timesteps // 2, condition, Adapter())


@pytest.mark.parametrize("rows", [8])
@pytest.mark.benchmark(group="denoiser, forward and backward")
def test_denoiser_backward(
    benchmark: BenchmarkFixture, model: DiffusionModel, requests: Sequence[Request], rows: int
) -> None:
    """One call and its gradient in the adapter."""
    x, condition = initial_latents(model, requests[:rows]), model.condition([r.prompt.text for r in requests[:rows]])
    benchmark.extra_info["rows"] = rows

    def both() -> None:
        model.denoise(x, model.training_timesteps // 2, condition, Adapter()).square().mean().backward()

    benchmark(both)


@pytest.mark.benchmark(group="sampling")
def test_sampling(
    benchmark: BenchmarkFixture, config: RunConfig, model: DiffusionModel, requests: Sequence[Request]
) -> None:
    """A batch of the evaluation, from noise to latents."""
    batch = requests[: config.evaluation.batch]
    benchmark.extra_info["pictures"] = len(batch)
    benchmark.pedantic(generate, args=(model, batch, Generation(config.sampler)), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="decode and reward, forward and backward")
def test_reward_gradient(
    benchmark: BenchmarkFixture, model: DiffusionModel, requests: Sequence[Request], reward: Reward
) -> None:
    """From latents to the reward and back to the latents, 4 pictures."""
    batch = requests[:4]
    latents, prompts = initial_latents(model, batch).requires_grad_(), [r.prompt for r in batch]
    benchmark.extra_info["pictures"] = len(batch)

    def both() -> None:
        torch.autograd.grad(reward(model.decode(latents), prompts).sum(), latents)

    benchmark(both)
