"""DPOK: the KL of a step, the surrogate, the baselines, and the gradient of all of it against closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import BASE, Adapter, Prompt, Reward, UserError
from harness.sampling import Transition, initial_latents, log_probability, sample, schedule, step_noise
from methods._policy_gradient import gaussian_kl
from methods._rollouts import Rollout
from methods._value_baseline import leave_one_out
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import Lab, assert_close, lab, requests

MOVING = {"learning_rate": 1e-2, "weight_decay": 0.0}
WIDE = {"clip_range": 1e9, "reward_weight": 1.0}


class LinearReward(Reward):
    """Half the sum of the latents' dimensions: the gradient is 1/2 in each, everywhere."""

    name, version, differentiable, role, unit = "linear", "1", True, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores in the pictures' own precision."""
        return 0.5 * images_BCHW.flatten(1).sum(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class FlatReward(Reward):
    """The same for every picture: no picture has an advantage, and only the KL is left."""

    name, version, differentiable, role, unit = "flat", "1", False, "proxy", "nothing"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Three."""
        return torch.full((len(images_BCHW),), 3.0, dtype=torch.float64)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


def test_kl_is_that_of_two_gaussians() -> None:
    """Against torch's own closed form, and as the mean log-ratio of samples within four standard errors."""
    draws = torch.Generator().manual_seed(3)
    one, other = (torch.randn(4, 3, 2, 2, generator=draws, dtype=torch.float64) for _ in range(2))
    policy, base = Transition(one, 0.7), Transition(other, 0.7)
    found = gaussian_kl(policy, base)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(one, 0.7), normal(other, 0.7)).flatten(1).mean(1)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0.0)
    noise = torch.randn(5_000, *one.shape, generator=draws, dtype=torch.float64)
    ratios = torch.stack([log_probability(x, policy) - log_probability(x, base) for x in one + 0.7 * noise])
    assert ((ratios.mean(0) - found).abs() < 4 * ratios.std(0) / math.sqrt(len(ratios))).all()
    assert (found > 20 * ratios.std(0) / math.sqrt(len(ratios))).all()  # the tolerance above is small


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_gradient_of_the_kl_by_hand(gaussian: GaussianModel, guidance: float) -> None:
    """Without advantages the gradient is that of beta * KL alone, written out for the adapter's bias and gain.

    The adapter adds d = bias + gain * x to the noise (guidance does not change it), so that the step's mean moves by
    c * d with c = sqrt(sigma_next^2 - std^2) - alpha_next * sigma / alpha.
    """
    setup = lab(gaussian, FlatReward, guidance=guidance, micro_batch=3)
    tuner = setup.tuner("dpok", rollout_size=8, updates_per_rollout=1, kl_weight=0.3)
    batch = requests(gaussian, 8)
    rollouts = tuner.collect(batch)
    bias, gain = (setup.inner.adapter_parameters()[name].detach() for name in ("bias", "gain"))
    expected = {"bias": torch.zeros_like(bias), "gain": torch.zeros_like(gain)}
    total, count = 0.0, 8 * len(tuner.actions)
    for i, step in enumerate(tuner.actions):
        c = math.sqrt(step.sigma_next**2 - step.std**2) - step.alpha_next * step.sigma / step.alpha
        for rollout in rollouts:
            d = bias + gain * rollout.states[i]
            slope = c**2 * d / step.std**2 / 3  # three dimensions: the KL is their mean
            expected["bias"] += 0.3 * slope / count
            expected["gain"] += 0.3 * slope * rollout.states[i] / count
            total += float((c * d).pow(2).sum()) / (2 * step.std**2) / 3 / count
    metrics = tuner.iterate(batch)
    found = {name: p.grad for name, p in setup.inner.adapter_parameters().items() if p.grad is not None}
    assert_close(found, expected)
    assert metrics["kl"] == pytest.approx(total, rel=1e-9)
    assert metrics["loss"] == pytest.approx(0.3 * total, rel=1e-9)


def test_kl_is_zero_at_the_base(tiny_model: StableDiffusion) -> None:
    """A fresh adapter is the base: no divergence, guidance included, and no KL at all where beta is 0."""
    setup = lab(tiny_model, adapter=0.0)
    assert setup.tuner("dpok", rollout_size=4, updates_per_rollout=1).iterate(requests(tiny_model, 4))["kl"] < 1e-20
    free = lab(tiny_model).tuner("dpok", rollout_size=4, kl_weight=0.0)
    assert "kl" not in free.iterate(requests(tiny_model, 4))


def test_base_rows_are_planned(gaussian: GaussianModel) -> None:
    """The KL asks the base once per action, without gradient; with beta 0 it is not asked."""
    with_kl = lab(gaussian, guidance=1.0).tuner("dpok", rollout_size=4).planned_cost().expected
    without = lab(gaussian, guidance=1.0).tuner("dpok", rollout_size=4, kl_weight=0.0).planned_cost().expected
    assert (with_kl.forward_rows, without.forward_rows) == (4 * 4 + 4 * 3, 4 * 4)
    assert with_kl.gradient_rows == without.gradient_rows == 4 * 3


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "moves"),
    [
        (1.1, 2.0, 5 * 1.1 * 2, True),
        (0.9, -2.0, 5 * 0.9 * -2, True),
        (1.5, 2.0, 5 * 1.2 * 2, False),
        (0.5, 2.0, 5 * 0.8 * 2, False),  # unlike DDPO's: clipped on both sides, whatever the advantage's sign
        (1.5, -2.0, 5 * 1.2 * -2, False),
        (0.5, -2.0, 5 * 0.8 * -2, False),
    ],
)
def test_clipping_by_hand(
    gaussian: GaussianModel, ratio: float, advantage: float, expected: float, moves: bool
) -> None:
    """The weighted advantage times the clipped ratio; the gradient stops wherever the ratio has left the range."""
    tuner = lab(gaussian).tuner("dpok", clip_range=0.2, reward_weight=5.0)
    new = torch.tensor([math.log(ratio) - 1.3], dtype=torch.float64, requires_grad=True)
    old, weight = torch.full_like(new, -1.3).detach(), torch.full_like(new, advantage).detach()
    value = tuner.surrogate(new, old, weight)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), new)
    assert slope.item() == pytest.approx(5 * ratio * advantage if moves else 0.0, abs=1e-12)


def test_ratio_is_one_until_the_first_optimiser_step(gaussian: GaussianModel) -> None:
    """`ratio_deviation` is 0 with one optimiser step per rollout and more than 0 with two."""
    found = []
    for updates in (1, 2):
        tuner = lab(gaussian).tuner("dpok", rollout_size=4, updates_per_rollout=updates, optimizer=MOVING)
        found.append(tuner.iterate(requests(gaussian, 4))["ratio_deviation"])
    assert found[0] < 1e-9
    assert found[1] > 1e-6


def test_leave_one_out_by_hand() -> None:
    """Each is compared with the mean of the others; an offset of all does not matter."""
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert leave_one_out(rewards).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    torch.testing.assert_close(leave_one_out(rewards - 1000), leave_one_out(rewards))


def test_a_picture_alone_is_refused(gaussian: GaussianModel) -> None:
    """There is nothing to compare it with."""
    with pytest.raises(UserError, match="give 2 or more"):
        lab(gaussian).tuner("dpok", rollout_size=1, updates_per_rollout=1)


def test_values_are_used_before_they_are_learnt(tiny_model: StableDiffusion) -> None:
    """V is 0 at first, so that the first weights are those without V: this rollout's rewards have not reached them."""
    batch = requests(tiny_model, 6)
    tuner = lab(tiny_model).tuner("dpok", rollout_size=6, value_learning_rate=1e-2)
    rollouts, rewards = tuner.collect_all(batch)
    first, second = (tuner.statistics.of(rollouts, rewards) for _ in range(2))
    torch.testing.assert_close(first, leave_one_out(rewards)[:, None].expand(-1, 3))
    assert (second - first).abs().max() > 1e-3 * rewards.std()


def test_values_know_state_step_and_prompt(tiny_model: StableDiffusion) -> None:
    """What V has learnt differs between states, steps and prompts."""
    tuner = lab(tiny_model).tuner("dpok", rollout_size=6, value_learning_rate=1e-2)
    rollouts, rewards = tuner.collect_all(requests(tiny_model, 6))
    for _ in range(4):
        tuner.statistics.of(rollouts, rewards)
    with torch.no_grad():
        here = tuner.statistics.values(rollouts[:1])
        elsewhere = tuner.statistics.values([copy.copy(rollouts[2])])
        told = copy.deepcopy(rollouts[0])
        object.__setattr__(told.request, "prompt", rollouts[1].request.prompt)
        other_prompt = tuner.statistics.values([told])
        same_state = copy.deepcopy(rollouts[0])
        same_state.states[:] = same_state.states[:1].clone()
        steps = tuner.statistics.values([same_state])
    assert (here - elsewhere).abs().min() > 1e-6
    assert (here - other_prompt).abs().min() > 1e-6
    assert (steps[0, 1:] - steps[0, 0]).abs().min() > 1e-6


@pytest.mark.parametrize("micro_batch", [3])
def test_results_do_not_depend_on_micro_batches(tiny_model: StableDiffusion, micro_batch: int) -> None:
    """Adapter and V after two iterations are the same for every split."""
    after = []
    for size in (16, micro_batch):
        setup = lab(tiny_model, micro_batch=size)
        tuner = setup.tuner("dpok", rollout_size=4, optimizer=MOVING, value_learning_rate=1e-2)
        for seed in range(2):
            tuner.iterate(requests(tiny_model, 4, seed))
        moved = setup.inner.adapter_parameters() | tuner.statistics.layers
        after.append({name: p.detach().clone() for name, p in moved.items()})
    assert_close(after[1], after[0], 1e-8)


def test_resumes_with_its_values(gaussian: GaussianModel) -> None:
    """Bit for bit with V and its optimiser restored; without V's state the next update is another."""
    setup = lab(gaussian)
    settings = {"rollout_size": 6, "optimizer": MOVING, "value_learning_rate": 1e-2}
    tuner = setup.tuner("dpok", **settings)
    tuner.iterate(requests(gaussian, 6, 0))
    adapter = {name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()}
    state = copy.deepcopy(tuner.state_dict())
    tuner.iterate(requests(gaussian, 6, 1))
    expected = {name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()}
    values = {name: p.detach().clone() for name, p in tuner.statistics.layers.items()}

    def resumed(whole: bool) -> bool:
        again = lab(gaussian)
        other = again.tuner("dpok", **settings)
        for name, parameter in again.inner.adapter_parameters().items():
            parameter.data.copy_(adapter[name])
        if whole:
            other.load_state_dict(state)
        else:
            other.optimizer.load_state_dict(state["optimizer"])
        other.iterate(requests(gaussian, 6, 1))
        found = again.inner.adapter_parameters()
        layers = other.statistics.layers
        return all(torch.equal(found[n], p) for n, p in expected.items()) and all(
            torch.equal(layers[n], p) for n, p in values.items()
        )

    assert resumed(whole=True)
    assert not resumed(whole=False)


def test_value_baseline_leaves_the_gradient_unbiased() -> None:
    """With and without V each picture's gradient is the reparameterised one on average.

    V learns from rollouts that are thrown away while the policy stands still. Every picture gets a copy of the adapter
    of its own, so that one rollout gives as many estimates as it has pictures; the method applies their mean.
    """
    model = GaussianModel(mean=0.0, std=0.5)
    setup = lab(model, LinearReward, steps=6, guidance=1.0, micro_batch=1500)
    settings = {"value_learning_rate": 1e-2, "value_width": 32, "value_steps": 20}
    tuner = setup.tuner("dpok", rollout_size=1500, updates_per_rollout=1, kl_weight=0.0, **WIDE, **settings)
    stream = requests(model, 2000)
    for start in (0, 250):
        for _ in range(3):
            tuner.statistics.of(*tuner.collect_all(stream[start : start + 250]))
    batch = stream[500:]
    rollouts, rewards = tuner.collect_all(batch)
    pathwise = reparameterised(setup, tuner, batch)
    weights = {"plain": leave_one_out(rewards)[:, None], "value": tuner.statistics.of(rollouts, rewards)}
    found = {name: score_function(setup, tuner, rollouts, weight) for name, weight in weights.items()}
    for estimate in found.values():
        errors = standard_errors(estimate - pathwise)
        assert errors.abs().max() < 4.5  # of six
        assert standard_errors(estimate + pathwise).abs().max() > 8  # the other sign is far away
    tuner.update(rollouts, weights["value"])
    steps = len(tuner.actions) * 3
    applied = torch.cat([p.grad.flatten() * steps for p in setup.inner.adapter_parameters().values()])
    torch.testing.assert_close(-applied, found["value"].mean(0), rtol=1e-8, atol=1e-10)


def copies(setup: Lab, count: int) -> Adapter:
    """The adapter, once for each of `count` pictures."""
    trained = setup.inner.adapter_parameters()
    return Adapter(parameters={n: p.detach().repeat(count, 1, 1, 1).requires_grad_() for n, p in trained.items()})


def gradient_by_picture(value: Tensor, adapter: Adapter) -> Tensor:
    """Gradient of a sum over pictures to each picture's own adapter, (N, 6)."""
    assert adapter.parameters is not None
    return torch.cat([g.flatten(1) for g in torch.autograd.grad(value, list(adapter.parameters.values()))], 1)


def score_function(setup: Lab, tuner: Any, rollouts: Sequence[Rollout], weights: Tensor) -> Tensor:
    """Sum over actions of weight * grad log p, by picture; log p summed over the three dimensions."""
    adapter, total = copies(setup, len(rollouts)), torch.zeros((), dtype=torch.float64)
    requested = [r.request for r in rollouts]
    for i, step in enumerate(tuner.actions):
        states, actions = torch.stack([r.states[i] for r in rollouts]), torch.stack([r.actions[i] for r in rollouts])
        new = tuner.log_policy(states, actions, step, requested, adapter)
        total = total + 3 * (weights.expand(-1, len(tuner.actions))[:, i] * new).sum()
    return gradient_by_picture(total, adapter)


def reparameterised(setup: Lab, tuner: Any, batch: list[Any]) -> Tensor:
    """Gradient of the reward through the noisy chain, by picture; the step without noise is held (it is no action)."""
    adapter, held = copies(setup, len(batch)), copies(setup, len(batch))
    latents = sample(
        setup.inner,
        initial_latents(setup.inner, batch),
        setup.inner.condition([r.prompt.text for r in batch]),
        tuner.sampler,
        adapter=lambda step: adapter if step.std > 0 else held,
        gradient_steps=len(tuner.steps),
        noise=step_noise(setup.inner, batch, setup.context.randomness, "rollout"),
    )
    return gradient_by_picture(LinearReward(setup.inner.device)(latents, []).sum(), adapter)


def standard_errors(values: Tensor) -> Tensor:
    """Mean over rows in units of its standard error, by column."""
    return values.mean(0) / (values.std(0) / math.sqrt(len(values)))


def test_the_base_of_the_kl_is_the_base(tiny_model: StableDiffusion) -> None:
    """The policy that the KL compares with is the model without adapter, whatever the adapter."""
    setup = lab(tiny_model, adapter=0.3)
    tuner = setup.tuner("dpok", rollout_size=4)
    batch = requests(tiny_model, 2)
    state, step = initial_latents(tiny_model, batch), schedule(tiny_model, tuner.sampler)[0]
    before = tuner.policy(state, step, batch, BASE).mean.detach()
    moved = tuner.policy(state, step, batch).mean.detach()
    for parameter in setup.inner.adapter_parameters().values():
        parameter.data.zero_()
    torch.testing.assert_close(tuner.policy(state, step, batch).mean.detach(), before, rtol=1e-10, atol=1e-12)
    assert (moved - before).abs().max() > 1e-6
