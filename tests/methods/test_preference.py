"""Direct preferences: pairs, losses and gradients by hand, at the base weights and away from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from harness.api import BASE, Adapter, DiffusionModel, Prompt, Randomness, Reward, UserError
from methods._candidates import Pair, ranked_pairs
from methods._likelihood import Lesson, Picture
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import Lab, assert_close, gradients, lab, reference_noise, requests


class EqualReward(Reward):
    """The same for all pictures."""

    name, version, differentiable, role, unit = "equal", "1", False, "proxy", "nothing"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """One quarter."""
        return images_BCHW.new_full((len(images_BCHW),), 0.25)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


def test_pairs_by_hand() -> None:
    """Best and worst of each prompt; equal rewards make a pair of two pictures that counts nothing."""
    rewards = torch.tensor([[1.0, 4.0, 2.0], [5.0, 3.0, 3.5], [2.0, 2.0, 2.0]])
    assert ranked_pairs(rewards)[:2] == [Pair(1, 0, 1.0), Pair(3, 4, 1.0)]
    assert ranked_pairs(rewards)[2] == Pair(6, 7, 0.0)


@pytest.mark.parametrize("method", ["dpo", "d3po"])
def test_equal_rewards_teach_nothing(gaussian: GaussianModel, method: str) -> None:
    """No preference, no gradient; what was planned is spent all the same."""
    setup = lab(gaussian, EqualReward)
    tuner = setup.tuner(method, rollout_size=4)
    assert tuner.iterate(requests(gaussian, 2))["gradient_norm"] == 0.0
    assert setup.meter.cost == tuner.planned_cost().expected


@pytest.mark.parametrize("method", ["dpo", "d3po"])
def test_loss_is_log_2_at_the_base(gaussian: GaussianModel, method: str) -> None:
    """An adapter that changes nothing prefers nothing; one that does, does."""
    settings = {"rollout_size": 4, "epochs": 1} if method == "dpo" else {"rollout_size": 4, "updates_per_rollout": 1}
    still = lab(gaussian, adapter=0.0).tuner(method, **settings).iterate(requests(gaussian, 2))
    moved = lab(gaussian, adapter=0.1).tuner(method, **settings).iterate(requests(gaussian, 2))
    assert still["loss"] == pytest.approx(math.log(2), abs=1e-14)
    assert abs(moved["loss"] - math.log(2)) > 1e-6


def pairs_of(model: DiffusionModel, count: int) -> tuple[list[Lesson], Tensor]:
    """Lessons of made-up latents, two a pair, and a noise for each pair."""
    draws, asked = Randomness(7), requests(model, count)
    lessons = []
    for i, request in enumerate(asked):
        latents = draws.normal((2, *model.latent_shape), "latents", i, dtype=model.dtype)
        lessons.append(Lesson((Picture(request, latents[0]), Picture(request, latents[1])), 1 / count))
    return lessons, torch.stack([draws.normal(model.latent_shape, "noise", i, dtype=model.dtype) for i in range(count)])


def denoising_error(setup: Lab, lessons: list[Lesson], side: int, t: int, noise: Tensor, adapter: Adapter) -> Tensor:
    """|noise_theta - noise|^2 of winners (side 0) or losers (side 1), without guidance, by its definition."""
    alpha, sigma = setup.inner.alpha_sigma(t)
    x = alpha * torch.stack([lesson.pictures[side].latent for lesson in lessons]) + sigma * noise
    texts = [lesson.pictures[side].request.prompt.text for lesson in lessons]
    predicted = reference_noise(setup.inner, x, t, texts, 1.0, adapter)
    return ((predicted - noise) ** 2).sum((1, 2, 3)) / noise[0].numel()


def gradient_of(setup: Lab, value: Tensor) -> dict[str, Tensor]:
    """Of a scalar with respect to the adapter."""
    trained = setup.inner.adapter_parameters()
    found = torch.autograd.grad(value, list(trained.values()), retain_graph=True)
    return dict(zip(trained, found, strict=True))


def test_dpo_gradient_at_the_base_is_the_closed_form(tiny_model: StableDiffusion) -> None:
    """There the sigmoid is one half: the gradient is beta/4 times that of e(winner) - e(loser)."""
    setup = lab(tiny_model, adapter=0.0, guidance=3.0)
    tuner = setup.tuner("dpo", beta=700.0)
    lessons, noise = pairs_of(tiny_model, 3)
    found = gradient_of(setup, tuner.loss(lessons, 400, noise).mean())
    winner, loser = (denoising_error(setup, lessons, side, 400, noise, Adapter()) for side in (0, 1))
    expected = gradient_of(setup, 0.5 * 700.0 / 2 * (winner - loser).mean())
    assert_close(found, expected)
    swapped = [Lesson((lesson.pictures[1], lesson.pictures[0]), lesson.weight) for lesson in lessons]
    turned = gradient_of(setup, tuner.loss(swapped, 400, noise).mean())
    assert_close(turned, {name: -g for name, g in found.items()})


def test_dpo_loss_away_from_the_base_by_hand(tiny_model: StableDiffusion) -> None:
    """-log sigmoid(-beta/2 * [(e_w - e_w_ref) - (e_l - e_l_ref)]), each term by its definition."""
    setup = lab(tiny_model, adapter=0.1)
    lessons, noise = pairs_of(tiny_model, 3)
    for beta in (5.0, 5000.0):
        e = [
            [denoising_error(setup, lessons, side, 250, noise, adapter) for adapter in (Adapter(), BASE)]
            for side in (0, 1)
        ]
        inside = -beta / 2 * ((e[0][0] - e[0][1]) - (e[1][0] - e[1][1]))
        expected = torch.log1p(torch.exp(-inside.abs())) + (-inside).clamp(min=0)
        found = setup.tuner("dpo", beta=beta).loss(lessons, 250, noise)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_dpo_gradient_against_finite_differences(tiny_model: StableDiffusion) -> None:
    """Along a random direction, away from the base."""
    setup = lab(tiny_model, adapter=0.1)
    tuner = setup.tuner("dpo", beta=30.0)
    lessons, noise = pairs_of(tiny_model, 3)
    trained = setup.inner.adapter_parameters()
    found = gradient_of(setup, tuner.loss(lessons, 250, noise).mean())
    direction = {name: Randomness(1).normal(p.shape, name, dtype=p.dtype) for name, p in trained.items()}
    values = []
    for sign in (1, -1):
        for name, p in trained.items():
            p.data += sign * 1e-5 * direction[name]
        values.append(tuner.loss(lessons, 250, noise).mean().item())
        for name, p in trained.items():
            p.data -= sign * 1e-5 * direction[name]
    slope = sum(float((found[name] * direction[name]).sum()) for name in found)
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_dpo_learns_the_best_against_the_worst(gaussian: GaussianModel) -> None:
    """Of the pictures that were collected, with equal weights."""
    tuner = lab(gaussian).tuner("dpo", rollout_size=6, candidates=3)
    pictures = [Picture(request, request.noise) for request in requests(gaussian, 6)]
    lessons = tuner.lessons(pictures, torch.tensor([[1.0, 4.0, 2.0], [5.0, 3.0, 3.5]]))
    assert [lesson.pictures for lesson in lessons] == [(pictures[1], pictures[0]), (pictures[3], pictures[4])]
    assert [lesson.weight for lesson in lessons] == [0.5, 0.5]


@pytest.mark.parametrize("guided", [True, False])
def test_dpo_costs_by_hand(gaussian: GaussianModel, guided: bool) -> None:
    """8 pictures by 4 guided steps; 3 epochs over 2 pairs of 2 pictures, with and without the adapter."""
    setup = lab(gaussian, guidance=4.0, micro_batch=3)
    tuner = setup.tuner("dpo", rollout_size=8, candidates=4, epochs=3, guided_loss=guided)
    tuner.iterate(requests(gaussian, 2))
    cost, rows = setup.meter.cost, 3 * 4 * (2 if guided else 1)
    assert cost == tuner.planned_cost().expected
    assert (cost.forward_rows, cost.gradient_rows, cost.backward_rows, cost.queries) == (64 + rows, rows, rows, 8)


@pytest.mark.parametrize(
    ("winner", "loser", "slope_winner", "slope_loser"),
    [
        (1.05, 0.95, 1, 1),
        (1.2, 0.95, 0, 1),  # the winner is already more likely than allowed
        (1.05, 0.7, 1, 0),  # the loser is already less likely than allowed
        (0.5, 2.0, 0, 0),  # wrong, but so far from the base that nothing is learnt
    ],
)
def test_d3po_loss_by_hand(
    gaussian: GaussianModel, winner: float, loser: float, slope_winner: int, slope_loser: int
) -> None:
    """Ratios clamped to 0.9..1.1; the slope is -beta * sigmoid(-beta*difference), and 0 where clamped."""
    tuner = lab(gaussian).tuner("d3po", beta=2.0, clamp=0.1)
    logs = [torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True) for ratio in (winner, loser)]
    value = tuner.loss(*logs)
    difference = 2.0 * (math.log(min(max(winner, 0.9), 1.1)) - math.log(min(max(loser, 0.9), 1.1)))
    assert value.item() == pytest.approx(math.log(1 + math.exp(-difference)), abs=1e-12)
    found = torch.autograd.grad(value.sum(), logs)
    slope = 2.0 / (1 + math.exp(difference))
    assert [g.item() for g in found] == pytest.approx([-slope * slope_winner, slope * slope_loser], abs=1e-12)


def log_density(setup: Lab, tuner: Any, rollout: Any, place: int, adapter: Adapter) -> Tensor:
    """Mean over dimensions of log N(action; mean, std), with the DDIM mean written out."""
    step = tuner.actions[place]
    state, action = rollout.states[place][None], rollout.actions[place][None]
    noise = reference_noise(setup.inner, state, step.t, [rollout.request.prompt.text], tuner.sampler.guidance, adapter)
    x0 = (state - step.sigma * noise) / step.alpha
    mean = step.alpha_next * x0 + math.sqrt(step.sigma_next**2 - step.std**2) * noise
    return torch.distributions.Normal(mean, step.std).log_prob(action).mean()


@pytest.mark.parametrize(("shift", "clamp"), [(0.0, 0.1), (0.1, 0.9), (0.1, 1e-3)])
def test_d3po_update_by_hand(tiny_model: StableDiffusion, shift: float, clamp: float) -> None:
    """Loss and gradient of an iteration against log-densities written out, one action at a time.

    At the base (no shift) the gradient is -beta/2 times that of log p(winner) - log p(loser); away from it with a
    narrow clamp, some actions are clamped.
    """
    setup, batch = lab(tiny_model, adapter=shift, guidance=2.0, final_alpha="first"), requests(tiny_model, 2)
    tuner = setup.tuner("d3po", rollout_size=4, updates_per_rollout=1, beta=3.0, clamp=clamp)
    rollouts = [tuner.collect([picture])[0] for first in batch for picture in (first, tuner.rival(first))]
    losses, differences, clamped = [], [], 0
    for one, other in (rollouts[:2], rollouts[2:]):
        winner, loser = (one, other) if one.reward > other.reward else (other, one)
        for place in range(4):
            logs = []
            for rollout in (winner, loser):
                policy = log_density(setup, tuner, rollout, place, Adapter())
                with torch.no_grad():
                    base = log_density(setup, tuner, rollout, place, BASE)
                differences.append(policy if rollout is winner else -policy)
                clamped += int(abs((policy - base).exp().item() - 1) > clamp)
                logs.append(((policy - base).exp().clamp(1 - clamp, 1 + clamp)).log())
            losses.append(-functional.logsigmoid(3.0 * (logs[0] - logs[1])))
    expected = gradient_of(setup, torch.stack(losses).mean())
    if shift == 0.0:
        closed = gradient_of(setup, -3.0 / 2 * torch.stack(differences).sum() / 8)
        assert_close(expected, closed)
    found = gradients(tuner, batch)
    assert_close(found, expected, 1e-8)
    assert (clamped > 0) == (clamp == 1e-3)
    assert tuner.iterate(batch)["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-10)


def test_d3po_pairs_share_their_start(gaussian: GaussianModel) -> None:
    """The same x_T and other actions; with `shared_start` off another x_T, too."""
    request = requests(gaussian, 1)[0]
    for shared in (True, False):
        tuner = lab(gaussian).tuner("d3po", shared_start=shared)
        one, other = tuner.collect([request, tuner.rival(request)])
        assert torch.equal(one.states[0], other.states[0]) == shared
        assert not torch.equal(one.actions[0], other.actions[0])
        noise = [r.actions[0] - tuner.policy(r.states[:1], tuner.actions[0], [r.request]).mean for r in (one, other)]
        assert not torch.allclose(noise[0], noise[1])


def test_d3po_learns_from_its_reference_not_from_the_policy_that_acted(gaussian: GaussianModel) -> None:
    """Log-ratios are against the base: before the first optimiser step they are 0 only where the adapter is."""
    for shift in (0.0, 0.1):
        setup = lab(gaussian, adapter=shift)
        tuner = setup.tuner("d3po", rollout_size=4)
        rollouts = tuner.collect(requests(gaussian, 4))
        acted = torch.stack([r.log_probabilities for r in rollouts])
        assert torch.allclose(tuner.reference(rollouts), acted, atol=1e-12) == (shift == 0.0)


def test_whole_pairs_are_asked_for(gaussian: GaussianModel) -> None:
    """With the remedy."""
    with pytest.raises(UserError, match="multiple of 2"):
        lab(gaussian).tuner("d3po", rollout_size=6, updates_per_rollout=2)
    with pytest.raises(UserError, match="multiple of candidates=2"):
        lab(gaussian).tuner("dpo", rollout_size=5)
