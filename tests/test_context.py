"""What the harness lends a method: the optimiser, micro-batches, and when to checkpoint."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from harness.api import Diverged, OptimizerConfig, Randomness, SamplerConfig
from harness.context import CellContext, ClippedAdamW, activation_bytes
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import lab, requests


def pair(first: list[float], second: list[float]) -> list[nn.Parameter]:
    """Two parameters at 1 with these gradients."""
    parameters = [nn.Parameter(torch.ones(len(values), dtype=torch.float64)) for values in (first, second)]
    for parameter, values in zip(parameters, (first, second), strict=True):
        parameter.grad = torch.tensor(values, dtype=torch.float64)
    return parameters


def test_norm_and_clipping_by_hand() -> None:
    """The norm over all parameters is returned as it was before clipping; the gradient is scaled to the limit."""
    parameters = pair([3.0, 0.0], [4.0])
    norm = ClippedAdamW(parameters, OptimizerConfig(max_gradient_norm=1.0)).step()
    assert norm == pytest.approx(5.0, abs=1e-12)
    clipped = [p.grad.tolist() for p in parameters if p.grad is not None]
    assert clipped[0] == pytest.approx([0.6, 0.0], abs=1e-6)
    assert clipped[1] == pytest.approx([0.8], abs=1e-6)


def test_no_limit_no_clipping() -> None:
    """Gradients above 1 pass unchanged where no limit is set, and below the limit where one is."""
    for limit in (None, 6.0):
        parameters = pair([3.0, 0.0], [4.0])
        ClippedAdamW(parameters, OptimizerConfig(max_gradient_norm=limit)).step()
        assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[3.0, 0.0], [4.0]]


def test_first_step_of_adamw_by_hand() -> None:
    """Decay by lr times weight decay, then a step of lr in the gradient's direction."""
    parameters = pair([3.0, -2.0], [4.0])
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.5, max_gradient_norm=None)
    ClippedAdamW(parameters, config).step()
    assert parameters[0].tolist() == pytest.approx([1 - 0.005 - 0.01, 1 - 0.005 + 0.01], abs=1e-8)
    assert parameters[1].tolist() == pytest.approx([1 - 0.005 - 0.01], abs=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [1.0, None])
def test_a_gradient_that_is_not_finite_is_refused(bad: float, limit: float | None) -> None:
    """Neither the parameters nor the moments change."""
    parameters = pair([3.0, bad], [4.0])
    optimizer = ClippedAdamW(parameters, OptimizerConfig(max_gradient_norm=limit))
    with pytest.raises(Diverged, match="norm"):
        optimizer.step()
    assert [p.tolist() for p in parameters] == [[1.0, 1.0], [1.0]]
    assert optimizer.state_dict()["state"] == {}


def test_zero_grad_forgets() -> None:
    """No gradient is left over from an earlier update."""
    parameters = pair([3.0, 1.0], [4.0])
    ClippedAdamW(parameters, OptimizerConfig()).zero_grad()
    assert [p.grad for p in parameters] == [None, None]


def test_micro_batches_are_consecutive_parts(gaussian: GaussianModel) -> None:
    """Every request once, in order, at most `micro_batch` at a time."""
    batch = requests(gaussian, 5)
    parts = [list(part) for part in lab(gaussian, micro_batch=2).context.micro_batches(batch)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [request for part in parts for request in part] == batch


def test_activation_bytes_are_measured(gaussian: GaussianModel, tiny_model: StableDiffusion) -> None:
    """A network keeps something per row; a larger batch of the same would keep in proportion."""
    lab(gaussian)
    lab(tiny_model)
    assert activation_bytes(gaussian) >= 3 * 8  # x is kept for the gain's gradient
    assert activation_bytes(tiny_model) > 4 * 64 * 8
    assert activation_bytes(tiny_model) == activation_bytes(tiny_model)


def test_checkpointing_where_activations_exceed_the_limit(tiny_model: StableDiffusion) -> None:
    """`auto` compares steps x rows x bytes with the limit; the switch decides otherwise; no gradient, no checkpoint."""
    lab(tiny_model)
    row = activation_bytes(tiny_model)

    def context(mode: str, gib: float) -> CellContext:
        return CellContext(tiny_model, Randomness(0), SamplerConfig(), 4, mode, gib)  # type: ignore[arg-type]

    limit = 6.5 * row / 2**30
    assert context("auto", limit).checkpointing(3, 2) is False
    assert context("auto", limit).checkpointing(7, 1) is True
    assert context("auto", limit).checkpointing(0, 100) is False
    assert context("on", 1e6).checkpointing(1, 1) is True
    assert context("on", 1e6).checkpointing(0, 1) is False
    assert context("off", 1e-9).checkpointing(10, 10) is False
