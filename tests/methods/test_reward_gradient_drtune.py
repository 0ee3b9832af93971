"""DRTune: its gradient is that of a chain whose denoiser reads fixed inputs, and of no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from harness.api import Adapter, Randomness, UserError
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import Lab, assert_close, distance, gradients, lab, mean_reward, reference_noise, requests


def drawn(setup: Lab, tuner: object, first: int) -> tuple[list[int], int]:
    """The trained steps, as numbers of steps left, and t_min of the update whose first request is `first`."""
    draws = setup.context.randomness.child("iteration", first)
    start = 1 + draws.integer("s", below=len(tuner.starts))  # type: ignore[attr-defined]
    spacing = setup.context.sampler.steps // tuner.config.k  # type: ignore[attr-defined]
    trained = [start + i * spacing for i in range(tuner.config.k)]  # type: ignore[attr-defined]
    return trained, 1 + draws.integer("t_min", below=tuner.config.m)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 4), (3, 5), (7, 7)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_a_linear_chain_of_outputs(gaussian: GaussianModel, k: int, m: int, seed: int) -> None:
    """By hand, without autograd: x_0 is linear in the outputs, and an output's only slopes are 1 and x_t.

    No factor of the network's own slope appears anywhere.
    """
    setup = lab(gaussian, steps=7, seed=seed)
    batch = requests(gaussian, 3, seed)
    tuner = setup.tuner("drtune", batch_size=3, k=k, m=m)
    trained, t_min = drawn(setup, tuner, batch[0].noise_id)
    bias, gain = (gaussian.adapter_parameters()[name].detach() for name in ("bias", "gain"))
    zero, one = torch.zeros(3, 1, 1).double(), torch.ones(3, 1, 1).double()
    expected = {"bias": zero.clone(), "gain": zero.clone()}
    for request in batch:
        x, slopes = request.noise.double(), {"bias": zero, "gain": zero}
        for left, step in zip(range(7, 0, -1), tuner.steps, strict=True):
            spread = step.alpha**2 * 0.25 + step.sigma**2
            noise = step.sigma * (x - step.alpha * 0.3) / spread + bias + gain * x
            on = 1.0 if left in trained else 0.0
            if left == t_min:
                x_0 = (x - step.sigma * noise) / step.alpha
                for name, slope in (("bias", one), ("gain", x)):
                    through = (slopes[name] - step.sigma * on * slope) / step.alpha
                    expected[name] += 2 * (x_0 - 0.8) / 3 * through / len(batch)
                break
            kept = step.alpha_next / step.alpha
            added = step.sigma_next - step.sigma * kept
            slopes = {"bias": kept * slopes["bias"] + added * on * one, "gain": kept * slopes["gain"] + added * on * x}
            x = kept * x + added * noise
    assert_close(gradients(tuner, batch), expected, 1e-12)


def test_it_equals_finite_differences_at_fixed_inputs(tiny_model: StableDiffusion) -> None:
    """Through UNet, guidance, decoder and reward: only what the trained steps say moves, at the states of the chain."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    tuner = setup.tuner("drtune", batch_size=2, k=2, m=3)
    trained, t_min = drawn(setup, tuner, batch[0].noise_id)
    steps = tuner.steps[: len(tuner.steps) - t_min + 1]
    texts = [request.prompt.text for request in batch]
    start = torch.stack([request.noise for request in batch]).double()
    at = {name: p.detach().clone() for name, p in tiny_model.adapter_parameters().items()}

    def chain(moved: Mapping[str, Tensor], states: list[Tensor] | None) -> tuple[list[Tensor], Tensor]:
        x, seen = start, []
        for i, step in enumerate(steps):
            seen.append(x)
            own = moved if 4 - step.index in trained else at
            inputs = x if states is None else states[i]
            noise = reference_noise(tiny_model, inputs, step.t, texts, 4.0, Adapter(parameters=own))
            x_0 = (x - step.sigma * noise) / step.alpha
            x = step.alpha_next * x_0 + step.sigma_next * noise
        return seen, x_0

    with torch.no_grad():
        states, _ = chain(at, None)
        direction = {name: Randomness(5).normal(p.shape, name, dtype=p.dtype) for name, p in at.items()}
        moved = [{name: p + sign * 1e-4 * direction[name] for name, p in at.items()} for sign in (1, -1)]
        fixed, free = (
            [float(-mean_reward(setup, chain(to, inputs)[1], batch)) for to in moved] for inputs in (states, None)
        )
    found = gradients(tuner, batch)
    along = float(sum((found[name] * direction[name]).sum() for name in direction))
    assert along == pytest.approx((fixed[0] - fixed[1]) / 2e-4, rel=1e-5)
    assert along != pytest.approx((free[0] - free[1]) / 2e-4, rel=1e-3)


def test_it_is_not_draft(gaussian: GaussianModel) -> None:
    """With every step trained and the whole chain run it differs from DRaFT by the network's slopes."""
    setup = lab(gaussian)
    batch = requests(gaussian, 4)
    drtune = gradients(setup.tuner("drtune", batch_size=4, k=4, m=1), batch)
    assert distance(drtune, gradients(setup.tuner("draft", batch_size=4), batch)) > 0.05


def test_on_a_chain_of_one_step_it_is_draft(gaussian: GaussianModel) -> None:
    """Nothing lies behind the only step."""
    setup = lab(gaussian, steps=1)
    batch = requests(gaussian, 4)
    drtune = gradients(setup.tuner("drtune", batch_size=4, k=1, m=1), batch)
    assert_close(drtune, gradients(setup.tuner("draft", batch_size=4), batch), 1e-12)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_each_update_costs_what_its_draws_say(gaussian: GaussianModel, checkpointing: str) -> None:
    """Rows of trained steps alone carry gradient and are recomputed."""
    setup = lab(gaussian, steps=7, checkpointing=checkpointing)  # type: ignore[arg-type]
    tuner = setup.tuner("drtune", batch_size=2, k=3, m=4)
    for first in range(8):
        batch = requests(gaussian, first + 2)[first:]
        trained, t_min = drawn(setup, tuner, first)
        before = setup.meter.cost
        tuner.iterate(batch)
        spent = asdict(setup.meter.cost - before)
        assert spent == asdict(tuner.cost_of(trained[0], t_min))
        assert spent["gradient_rows"] == 4 * sum(t >= t_min for t in trained)
        assert spent["recomputed_rows"] == (4 * sum(t > t_min for t in trained) if checkpointing == "on" else 0)


def test_checkpointing_changes_nothing(tiny_model: StableDiffusion) -> None:
    """Frozen and trained steps are recomputed as they were."""
    batch = requests(tiny_model, 2)
    kept, again = (lab(tiny_model, checkpointing=how) for how in ("off", "on"))
    found = [gradients(setup.tuner("drtune", batch_size=2, k=3, m=1), batch) for setup in (kept, again)]
    assert_close(found[1], found[0], 1e-12)
    assert again.meter.cost.recomputed_rows > kept.meter.cost.recomputed_rows == 0


def test_the_trained_steps_are_spaced_and_cover_the_chain(gaussian: GaussianModel) -> None:
    """Every step is trained for some s, all equally often where K divides T."""
    for steps, k in [(10, 5), (10, 3), (7, 2), (5, 5), (4, 1)]:
        tuner = lab(gaussian, steps=steps).tuner("drtune", k=k, m=1)
        choices = [tuner.trained(start) for start in tuner.starts]
        often = Counter(t for trained in choices for t in trained)
        assert set(often) == set(range(1, steps + 1))
        assert {b - a for trained in choices for a, b in pairwise(trained)} <= {steps // k}
        if steps % k == 0:
            assert set(often.values()) == {1}


@pytest.mark.parametrize("settings", [{"k": 5}, {"k": 1, "m": 2}, {"k": 2, "m": 4}])
def test_chains_that_could_train_nothing_are_refused(gaussian: GaussianModel, settings: dict[str, int]) -> None:
    """More trained steps than steps, or a stop before the first trained one."""
    with pytest.raises(UserError, match="drtune"):
        lab(gaussian).tuner("drtune", **settings)
