"""DPOK on a linear reward reaches the tilted Gaussian that theory names.

The optimum of w * E[r] - beta * sum_t KL is the base's chain tilted by exp(w/beta * r) for each x_T. With r = a * x_0
in every dimension it has the base's variance, and its mean is w/beta * a * S further on, S being the part of the
variance of x_0 that the steps' noise gives. Both are computed exactly from the trained adapter, none is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.api import BASE, Adapter, Prompt, Reward, SamplerConfig
from tests.fakes import lab, requests
from tests.timed_gaussian import TimedGaussian, moments

SLOPE = 0.2


class LinearReward(Reward):
    """SLOPE times the sum of the latents' dimensions, far from zero."""

    name, version, differentiable, role, unit = "linear", "1", False, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores without a gradient."""
        return SLOPE * images_BCHW.detach().flatten(1).sum(1) - 7

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


@pytest.mark.parametrize("value_baseline", [True, False])
@pytest.mark.parametrize("ratio", [5.0, 2.5])
def test_dpok_reaches_the_tilted_gaussian(value_baseline: bool, ratio: float) -> None:
    """Mean within a tenth of the tilt, variance within a tenth; the tilt is w/beta, and half of it is another place."""
    sampler = SamplerConfig(steps=4, guidance=1.0, final_alpha="first", eta=1.0)
    model = TimedGaussian(sampler)
    setup = lab(model, LinearReward, adapter=0.0, micro_batch=256, steps=4, guidance=1.0, final_alpha="first")
    tuner = setup.tuner(
        "dpok",
        rollout_size=256,
        updates_per_rollout=1,
        reward_weight=ratio,
        kl_weight=1.0,
        value_baseline=value_baseline,
        value_learning_rate=1e-3,
        value_width=32,
        optimizer={"learning_rate": 1e-2, "weight_decay": 0.0, "max_gradient_norm": None},
    )
    base = moments(model, sampler, BASE)
    stream, found = requests(model, 256 * 200), []
    for i in range(200):
        tuner.iterate(stream[256 * i : 256 * (i + 1)])
        if i >= 100:  # the mean over iterations is steadier than the last
            found.append(moments(model, sampler, Adapter()))
    mean = torch.stack([m.mean for m in found]).mean(0) - base.mean
    variance = torch.stack([m.variance for m in found]).mean(0)
    tilt = ratio * SLOPE * base.injected
    assert ((mean - tilt).abs() < 0.1 * tilt).all()
    assert ((variance - base.variance).abs() < 0.1 * base.variance).all()
