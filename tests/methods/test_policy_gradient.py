"""Policy gradients: ratios, clipping, advantages, and the estimator itself against the reparameterised gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import Adapter, Diverged, Randomness, UserError
from harness.sampling import Step, initial_latents, sample, step_noise
from methods._policy_gradient import PromptStatistics
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import CPU, BrokenReward, Lab, QuadraticReward, assert_close, distance, gradients, lab, requests

MOVING = {"optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0}}
METHODS = ["ddpo", "ddpo-sf"]


def largest_ratio_deviation(tuner: Any, rollouts: list[Any]) -> float:
    """Largest |ratio - 1| of the current policy to the one that acted, over pictures and actions."""
    found = []
    with torch.no_grad():
        for i, step in enumerate(tuner.actions):
            states, actions = (
                torch.stack([r.states[i] for r in rollouts]),
                torch.stack([r.actions[i] for r in rollouts]),
            )
            new = tuner.log_policy(states, actions, step, [r.request for r in rollouts])
            old = torch.stack([r.log_probabilities[i] for r in rollouts])
            found.append(float(((new - old).exp() - 1).abs().max()))
    return max(found)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ratio_is_one_until_the_first_optimiser_step(tiny_model: StableDiffusion, guidance: float) -> None:
    """The policy that learns is the policy that acted, guidance included, until the first step moves it."""
    tuner = lab(tiny_model, guidance=guidance).tuner("ddpo", rollout_size=4, **MOVING)
    rollouts = tuner.collect(requests(tiny_model, 4))
    assert largest_ratio_deviation(tuner, rollouts) < 1e-9
    tuner.update(rollouts[:2], torch.tensor([[1.0], [-1.0]]))
    assert largest_ratio_deviation(tuner, rollouts) > 1e-6


def test_ratio_deviation_metric(gaussian: GaussianModel) -> None:
    """`ratio_deviation` is 0 with one optimiser step per rollout, and more than 0 with two."""
    found = []
    for updates in (1, 2):
        tuner = lab(gaussian).tuner("ddpo", rollout_size=4, updates_per_rollout=updates, **MOVING)
        found.append(tuner.iterate(requests(gaussian, 4))["ratio_deviation"])
    assert found[0] < 1e-9
    assert found[1] > 1e-6


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "moves"),
    [
        (1.5, 2.0, 1.2 * 2, False),  # already more likely than allowed
        (0.5, 2.0, 0.5 * 2, True),
        (1.1, 2.0, 1.1 * 2, True),
        (1.5, -2.0, 1.5 * -2, True),
        (0.5, -2.0, 0.8 * -2, False),  # already less likely than allowed
        (0.9, -2.0, 0.9 * -2, True),
    ],
)
def test_clipping_by_hand(
    gaussian: GaussianModel, ratio: float, advantage: float, expected: float, moves: bool
) -> None:
    """The smaller of plain and clipped, which stops the gradient only where the policy has gone far enough already."""
    tuner = lab(gaussian).tuner("ddpo", clip_range=0.2)
    new = torch.tensor([math.log(ratio) - 1.3], dtype=torch.float64, requires_grad=True)
    old, weight = torch.full_like(new, -1.3).detach(), torch.full_like(new, advantage).detach()
    value = tuner.surrogate(new, old, weight)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    (slope,) = torch.autograd.grad(value.sum(), new)
    assert slope.item() == pytest.approx(ratio * advantage if moves else 0.0, abs=1e-12)


def test_statistics_by_hand() -> None:
    """A prompt with enough rewards is compared with its own buffer, one with fewer with the current rollout."""
    statistics = PromptStatistics(buffer=3, minimum=3)
    first = statistics.advantages(["a", "a", "b"], torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64))
    deviation = math.sqrt(8 / 3) + 1e-6  # of 1, 3 and 5
    assert first.tolist() == pytest.approx([-2 / deviation, 0.0, 2 / deviation])
    second = statistics.advantages(["a", "a", "b"], torch.tensor([8.0, 4.0, 0.0], dtype=torch.float64))
    assert list(statistics.rewards["a"]) == [3.0, 8.0, 4.0]  # 1 has left the buffer of three
    own, rollout = math.sqrt(14 / 3) + 1e-6, math.sqrt(32 / 3) + 1e-6
    assert second.tolist() == pytest.approx([3 / own, -1 / own, -4 / rollout])


def test_statistics_round_trip() -> None:
    """Restored statistics give the same advantages, and still forget what leaves the buffer."""
    statistics = PromptStatistics(buffer=4, minimum=2)
    statistics.advantages(["a", "a", "b", "a"], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    restored = PromptStatistics(buffer=4, minimum=2)
    restored.load_state_dict(statistics.state_dict())
    rewards = torch.tensor([0.5, 7.0, 1.5])
    assert torch.equal(restored.advantages(["a", "b", "a"], rewards), statistics.advantages(["a", "b", "a"], rewards))
    assert restored.state_dict() == statistics.state_dict()
    assert len(restored.rewards["a"]) == 4


def test_equal_rewards_teach_nothing() -> None:
    """No spread, no advantage: zero instead of a division by zero."""
    advantages = PromptStatistics(buffer=8, minimum=2).advantages(["a"] * 4, torch.full((4,), 0.25))
    assert advantages.tolist() == [0.0] * 4


def test_advantages_are_clipped(gaussian: GaussianModel) -> None:
    """A clip below every advantage gives the gradient of their signs times the clip."""
    batch = requests(gaussian, 6)
    found = [
        gradients(lab(gaussian).tuner("ddpo-sf", rollout_size=6, advantage_clip=clip), batch) for clip in (1e-4, 2e-4)
    ]
    assert_close(found[1], {name: 2 * g for name, g in found[0].items()})


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_noise_is_no_action(gaussian: GaussianModel, method: str) -> None:
    """The last step onto a clean latent is left out; onto the first level it counts; a chain of none is refused."""
    clean = lab(gaussian, final_alpha="one").tuner(method)
    noisy = lab(gaussian, final_alpha="first").tuner(method)
    assert [step.index for step in clean.actions] == [0, 1, 2]
    assert [step.index for step in noisy.actions] == [0, 1, 2, 3]
    assert [len(r.actions) for r in clean.collect(requests(gaussian, 2))] == [3, 3]
    with pytest.raises(UserError, match="at least one noisy step"):
        lab(gaussian, steps=1, final_alpha="one").tuner(method)


def test_actions_are_the_states_that_follow(gaussian: GaussianModel) -> None:
    """Each action is the next state of its own picture, whatever the micro-batches."""
    batch = requests(gaussian, 5)
    tuner = lab(gaussian).tuner("ddpo")
    together, alone = tuner.collect(batch), [tuner.collect([request])[0] for request in batch]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.actions[:-1], one.states[1:])
        assert torch.equal(one.states[0], one.request.noise.double())
        torch.testing.assert_close(one.actions, other.actions, rtol=1e-12, atol=1e-12)
        assert one.reward == pytest.approx(other.reward, abs=1e-12)


def test_ddpo_with_one_step_per_rollout_is_ddpo_sf(tiny_model: StableDiffusion) -> None:
    """Where the ratio is 1 its gradient is the score function's."""
    batch = requests(tiny_model, 4)
    importance = gradients(lab(tiny_model).tuner("ddpo", rollout_size=4, updates_per_rollout=1), batch)
    score = gradients(lab(tiny_model).tuner("ddpo-sf", rollout_size=4), batch)
    assert_close(importance, score)


@pytest.mark.parametrize(("method", "updates"), [("ddpo", 2), ("ddpo-sf", 1)])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_results_do_not_depend_on_micro_batches(
    tiny_model: StableDiffusion, method: str, updates: int, micro_batch: int
) -> None:
    """The parameters after an iteration are the same for every split, all optimiser steps included."""
    batch = requests(tiny_model, 6)
    after = []
    for size in (16, micro_batch):
        setup = lab(tiny_model, micro_batch=size)
        setup.tuner(method, rollout_size=6, updates_per_rollout=updates, **MOVING).iterate(batch)
        after.append({name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()})
    assert_close(after[1], after[0], 1e-9)


def test_every_picture_serves_one_optimiser_step(gaussian: GaussianModel) -> None:
    """A rollout that cannot be shared out evenly is refused, and says so."""
    with pytest.raises(UserError, match="multiple of"):
        lab(gaussian).tuner("ddpo", rollout_size=5, updates_per_rollout=2)


def test_a_reward_that_is_no_number_diverges(gaussian: GaussianModel) -> None:
    """Such a rollout changes neither parameters nor statistics."""
    setup = lab(gaussian, BrokenReward)
    tuner = setup.tuner("ddpo", rollout_size=4, **MOVING)
    before = {name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()}
    with pytest.raises(Diverged, match="reward"):
        tuner.iterate(requests(gaussian, 4))
    assert all(torch.equal(p, before[name]) for name, p in setup.inner.adapter_parameters().items())
    assert tuner.statistics.state_dict() == {}


def reparameterised(setup: Lab, tuner: Any, batch: list[Any]) -> tuple[dict[str, Tensor], float]:
    """Gradient of minus the mean reward through the noisy chain itself, and the rewards' standard deviation.

    The step without noise is no action: it belongs to the environment, so its parameters are held.
    """
    held = Adapter(parameters={name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()})

    def adapter(step: Step) -> Adapter:
        return Adapter() if step.std > 0 else held

    latents = sample(
        setup.inner,
        initial_latents(setup.inner, batch),
        setup.inner.condition([r.prompt.text for r in batch]),
        tuner.sampler,
        adapter=adapter,
        gradient_steps=len(tuner.steps),
        noise=step_noise(setup.inner, batch, setup.context.randomness, "rollout"),
    )
    rewards = QuadraticReward(CPU)(setup.inner.decode(latents), [])
    trained = setup.inner.adapter_parameters()
    found = torch.autograd.grad(-rewards.mean(), list(trained.values()))
    return dict(zip(trained, found, strict=True)), float(rewards.detach().std(correction=0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("final", ["one", "first"])
def test_policy_gradient_agrees_with_the_reparameterised_gradient(method: str, final: str) -> None:
    """On a Gaussian with exact score both estimate the same gradient, within four standard errors.

    A rollout's gradient becomes an unbiased estimate when what the method does to scale is undone: the standard
    deviation of the rewards, the mean over actions and latent dimensions, and the reward's share in its own baseline.
    The opposite sign must be many standard errors away, or the agreement would say nothing.
    """
    model = GaussianModel(mean=0.0, std=0.5)
    steps, size, rollouts = (4, 250, 24) if final == "one" else (2, 250, 24)
    setup = lab(model, steps=steps, final_alpha=final, guidance=1.0, micro_batch=size)
    tuner = setup.tuner(
        method,
        rollout_size=size,
        advantage_clip=1e9,
        per_prompt_minimum=10**6,
        per_prompt_buffer=1,
        updates_per_rollout=1,
    )
    scale = len(tuner.actions) * 3 * size / (size - 1)
    everything = requests(model, size * rollouts)
    policy, pathwise = [], []
    for start in range(0, len(everything), size):
        batch = everything[start : start + size]
        expected, deviation = reparameterised(setup, tuner, batch)
        found = gradients(tuner, batch)
        # Channels are alike, so their mean is taken: one number for the bias, one for the gain.
        policy.append([found[name].mean() * scale * (deviation + 1e-6) for name in ("bias", "gain")])
        pathwise.append([expected[name].mean() for name in ("bias", "gain")])
    difference = torch.tensor(policy) - torch.tensor(pathwise)
    flipped = -torch.tensor(policy) - torch.tensor(pathwise)
    assert (standard_errors(difference).abs() < 4).all()
    assert standard_errors(flipped).abs().max() > 8


def standard_errors(values: Tensor) -> Tensor:
    """Mean over rows in units of its standard error, by column."""
    return values.mean(0) / (values.std(0) / math.sqrt(len(values)))


def test_noise_of_rollouts_is_keyed_by_requests(gaussian: GaussianModel) -> None:
    """The same picture in another order acts the same; other seeds act otherwise."""
    batch = requests(gaussian, 4)
    straight = lab(gaussian).tuner("ddpo").collect(batch)
    turned = lab(gaussian).tuner("ddpo").collect(batch[::-1])[::-1]
    for one, other in zip(straight, turned, strict=True):
        assert torch.equal(one.actions, other.actions)
    setup = lab(gaussian)
    setup.context.randomness = Randomness(1, "method")
    other = setup.tuner("ddpo").collect(batch)
    assert distance({"x": other[0].actions}, {"x": straight[0].actions}) > 0.01
