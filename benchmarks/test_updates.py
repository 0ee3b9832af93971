"""One update of each method, with the default settings of the embedded model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from harness.api import DiffusionModel, Randomness, Request, TrainedFineTuner
from harness.config import ArmConfig, RunConfig
from harness.context import CellContext
from harness.grid import build_arm
from harness.registry import discover, load_reward


@pytest.mark.parametrize("method", sorted(discover("methods")))
@pytest.mark.benchmark(group="one iteration")
def test_iteration(
    benchmark: BenchmarkFixture, config: RunConfig, model: DiffusionModel, requests: Sequence[Request], method: str
) -> None:
    """One collection with its optimiser steps; the pictures that it scores are in `extra_info`."""
    arm = build_arm(ArmConfig(label=method, method=method), config)
    model.add_adapter(config.adapter, Randomness(0, "benchmark"))
    context = CellContext(model, Randomness(0, "benchmark"), arm.sampler, config.micro_batch)
    tuner = arm.finetuner(model, load_reward("jpeg-compressibility")(torch.device("cpu")), arm.config, context)
    if not isinstance(tuner, TrainedFineTuner):
        pytest.skip(f"{method} has no update: it trains nothing")
    expected = tuner.planned_cost().expected
    benchmark.extra_info.update(queries=expected.queries, denoiser_rows=expected.denoiser_rows)
    batch = requests[: tuner.requests_per_iteration]
    benchmark.pedantic(tuner.iterate, args=(batch,), rounds=3, warmup_rounds=1)
