"""Reward-weighted and selected likelihood: weights by hand, the loss against closed forms, plain fine-tuning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import Adapter, Diverged, PredictionType, Randomness, UserError
from methods._candidates import candidate
from methods._likelihood import Lesson, Picture, loss_target
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import (
    CPU,
    BrokenReward,
    Lab,
    QuadraticReward,
    assert_close,
    evaluate,
    gradients,
    lab,
    reference_chain,
    reference_noise,
    requests,
)

REWARDS = torch.tensor([[1.0, 3.0], [5.0, 9.0]], dtype=torch.float64)


def softmax(*scores: float) -> list[float]:
    """By hand."""
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 4, "temperature_unit": "reward"}, [*softmax(0.25, 0.75), *softmax(1.25, 2.25)]),
        # Deviations are 1 and 2: both prompts weigh their pictures alike.
        ({"temperature": 0.5}, [*softmax(-2, 2), *softmax(-2, 2)]),
        ({"temperature": math.inf}, [0.5, 0.5, 0.5, 0.5]),
        ({"weighting": "sparse", "keep": 0.1}, [0.0, 1.0, 0.0, 1.0]),
        ({"weighting": "sparse", "keep": 1.0}, [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_rwr_weights_by_hand_within_prompts(
    gaussian: GaussianModel, settings: dict[str, Any], expected: list[float]
) -> None:
    """Each prompt's weights sum to one over the number of prompts."""
    tuner = lab(gaussian).tuner("rwr", rollout_size=4, candidates=2, **settings)
    weights = tuner.weights(REWARDS).flatten().tolist()
    assert weights == pytest.approx([w / 2 for w in expected], abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 4, "temperature_unit": "reward"}, softmax(0.25, 0.75, 1.25, 2.25)),
        # Mean 4.5, deviation sqrt(35)/2.
        ({"temperature": 1}, softmax(*((r - 4.5) / (math.sqrt(35) / 2) for r in (1, 3, 5, 9)))),
        ({"weighting": "sparse", "keep": 0.5}, [0.0, 0.0, 0.5, 0.5]),
        ({"weighting": "sparse", "keep": 0.01}, [0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_rwr_weights_by_hand_over_the_collection(
    gaussian: GaussianModel, settings: dict[str, Any], expected: list[float]
) -> None:
    """All pictures compete; the weights sum to one."""
    tuner = lab(gaussian).tuner("rwr", rollout_size=4, candidates=2, compare="collection", **settings)
    assert tuner.weights(REWARDS).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_raft_keeps_the_best_of_each_prompt(gaussian: GaussianModel) -> None:
    """One picture of each prompt, the first of equals, all with the same weight."""
    tuner = lab(gaussian).tuner("raft", rollout_size=6, candidates=3)
    rewards = torch.tensor([[1.0, 7.0, 7.0], [9.0, 2.0, 8.0]])
    pictures = [Picture(request, request.noise) for request in requests(gaussian, 6)]
    lessons = tuner.lessons(pictures, rewards)
    assert [lesson.pictures[0] for lesson in lessons] == [pictures[1], pictures[3]]
    assert [lesson.weight for lesson in lessons] == [0.5, 0.5]


def test_a_softmax_that_leaves_one_picture_still_costs_what_it_planned(gaussian: GaussianModel) -> None:
    """Weights that underflow to zero do not change how much is learnt."""
    setup = lab(gaussian)
    tuner = setup.tuner("rwr", rollout_size=8, candidates=4, temperature=1e-6)
    assert (tuner.weights(torch.randn(2, 4, generator=torch.Generator().manual_seed(0))) == 0).any()
    tuner.iterate(requests(gaussian, 2))
    assert setup.meter.cost == tuner.planned_cost().expected


@pytest.mark.parametrize("method", ["rwr", "raft"])
@pytest.mark.parametrize("guided", [True, False])
def test_costs_by_hand(gaussian: GaussianModel, method: str, guided: bool) -> None:
    """12 pictures by 4 guided steps; 3 epochs over what is kept: all 12, or 2 of the 6 of a prompt, or 1."""
    for settings, kept in {"rwr": [({}, 12), ({"weighting": "sparse", "keep": 0.3}, 4)], "raft": [({}, 2)]}[method]:
        setup = lab(gaussian, guidance=4.0, micro_batch=5)
        tuner = setup.tuner(method, rollout_size=12, candidates=6, epochs=3, guided_loss=guided, **settings)
        tuner.iterate(requests(gaussian, 2))
        cost = setup.meter.cost
        assert cost == tuner.planned_cost().expected == tuner.planned_cost().maximal
        assert (cost.forward_rows, cost.queries, cost.decodes) == (12 * 4 * 2, 12, 12)
        assert cost.gradient_rows == cost.backward_rows == 3 * kept * (2 if guided else 1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_target_is_what_the_true_answer_would_be(gaussian: GaussianModel, kind: PredictionType) -> None:
    """Taken for the denoiser's output, the target gives back the very noise and latent."""
    gaussian.prediction_type = kind
    x0, noise = torch.randn(2, 5, *gaussian.latent_shape, generator=torch.Generator().manual_seed(1)).double()
    if kind == "flow":  # alpha = 1 - sigma
        gaussian.alpha_sigma = lambda t: (1 - t / 1000, t / 1000)  # type: ignore[method-assign]
    found = gaussian._noise_and_x0(gaussian.noised(x0, 400, noise), 400, loss_target(gaussian, x0, 400, noise))
    torch.testing.assert_close(found, (noise, x0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [19, 499, 979])
def test_loss_of_the_exact_denoiser_is_the_posterior_variance(t: int) -> None:
    """For data of N(mean, std^2), E (noise - E[noise | x_t])^2 = (alpha*std)^2 / ((alpha*std)^2 + sigma^2)."""
    model = GaussianModel(mean=0.3, std=0.5)
    tuner = lab(model, adapter=0.0, guidance=1.0).tuner("rwr")
    request, draws = requests(model, 1)[0], Randomness(5)
    x0 = 0.3 + 0.5 * draws.normal((3000, 3, 1, 1), "x0", dtype=torch.float64)
    noise = draws.normal((3000, 3, 1, 1), "noise", dtype=torch.float64)
    errors = tuner.error([Picture(request, x) for x in x0], t, noise, Adapter()).detach()
    alpha, sigma = model.alpha_sigma(t)
    expected = (alpha * 0.5) ** 2 / ((alpha * 0.5) ** 2 + sigma**2)
    assert errors.mean().item() == pytest.approx(expected, abs=4 * float(errors.std()) / math.sqrt(3000))


def plain_fine_tuning(setup: Lab, tuner: Any, batch: list[Any], guidance: float) -> dict[str, Tensor]:
    """Gradient of the mean denoising loss of the batch's own pictures, written out one picture at a time."""
    draws = setup.context.randomness.child("iteration", batch[0].noise_id, "epoch", 0)
    trained, losses = setup.inner.adapter_parameters(), []
    for request in batch:
        with torch.no_grad():
            x0 = reference_chain(setup.inner, [request], setup.context.sampler, [Adapter()] * 4)
        key = (request.prompt.id, request.noise_id)
        t = [999, 749, 499, 249][draws.integer("t", *key, below=4)]
        noise = draws.normal(setup.inner.latent_shape, "noise", *key, dtype=setup.inner.dtype)[None]
        alpha, sigma = setup.inner.alpha_sigma(t)
        x = alpha * x0 + sigma * noise
        predicted = reference_noise(setup.inner, x, t, [request.prompt.text], guidance, Adapter())
        losses.append((predicted - noise).pow(2).mean())
    found = torch.autograd.grad(torch.stack(losses).mean(), list(trained.values()))
    return dict(zip(trained, found, strict=True))


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("raft", {}), ("rwr", {"compare": "collection", "temperature": math.inf})],
)
def test_without_preference_it_is_plain_fine_tuning(
    tiny_model: StableDiffusion, method: str, settings: dict[str, Any], guided: bool
) -> None:
    """RAFT with one candidate, and RWR with an infinite temperature, learn all pictures alike."""
    setup, batch = lab(tiny_model, guidance=3.0), requests(tiny_model, 3)
    tuner = setup.tuner(method, rollout_size=3, candidates=1, epochs=1, guided_loss=guided, **settings)
    found = gradients(tuner, batch)
    assert_close(found, plain_fine_tuning(setup, tuner, batch, 3.0 if guided else 1.0))


def test_rwr_gradient_is_the_weighted_mean_of_the_pictures(gaussian: GaussianModel) -> None:
    """Each picture's own gradient, times its weight."""
    setup, batch = lab(gaussian), requests(gaussian, 4)
    settings = {"rollout_size": 4, "candidates": 1, "compare": "collection", "epochs": 1}
    tuner = setup.tuner("rwr", temperature=0.7, **settings)
    found = gradients(tuner, batch)
    pictures, rewards = tuner.collect(batch)
    z = (rewards - rewards.mean()) / rewards.std(correction=0)
    weights = softmax(*(z / 0.7).tolist())
    draws = setup.context.randomness.child("iteration", batch[0].noise_id, "epoch", 0)
    total = {name: torch.zeros_like(g) for name, g in found.items()}
    for weight, picture in zip(weights, pictures, strict=True):
        tuner.update([Lesson((picture,), 1.0)], draws)
        for name, parameter in setup.inner.adapter_parameters().items():
            total[name] += weight * parameter.grad
    assert_close(found, total, 1e-5)  # the deviation's small constant


def test_timesteps_and_noise_are_fresh_in_each_epoch_and_keyed_by_ids(gaussian: GaussianModel) -> None:
    """The same lessons in another order meet the same t and noise; another epoch brings others."""
    seen: list[tuple[int, Tensor]] = []
    tuner = lab(gaussian).tuner("raft", timesteps="all")
    original = tuner.loss

    def spy(lessons: Any, t: int, noise: Tensor) -> Tensor:
        seen.append((t, noise))
        result: Tensor = original(lessons, t, noise)
        return result

    tuner.loss = spy
    lessons = [Lesson((Picture(r, r.noise.double()),), 0.1) for r in requests(gaussian, 10)]
    tuner.update(lessons, Randomness(3))
    straight, seen[:] = list(seen), []
    tuner.update(lessons[::-1], Randomness(3))
    turned, seen[:] = list(seen), []
    tuner.update(lessons, Randomness(4))
    assert [t for t, _ in straight] == [t for t, _ in turned]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(straight, turned, strict=True))
    assert [t for t, _ in straight] != [t for t, _ in seen]
    assert not {t for t, _ in straight} <= {999, 749, 499, 249}


def test_candidates_are_the_request_and_others(gaussian: GaussianModel) -> None:
    """The first is the request itself; ids and latents of the others are their own, and the same every time."""
    request, draws = requests(gaussian, 1)[0], Randomness(0, "method")
    first, second, third = (candidate(request, k, gaussian, draws) for k in range(3))
    assert first is request
    assert len({r.noise_id for r in (first, second, third)}) == 3
    assert len({float(r.noise.sum()) for r in (first, second, third)}) == 3
    assert torch.equal(second.noise, candidate(request, 1, gaussian, draws).noise)


def test_settings_that_teach_nothing_are_refused(gaussian: GaussianModel) -> None:
    """With the remedy."""
    with pytest.raises(UserError, match="multiple of candidates=3"):
        lab(gaussian).tuner("raft", rollout_size=8, candidates=3)
    with pytest.raises(UserError, match="compare=collection"):
        lab(gaussian).tuner("rwr", candidates=1)


def test_a_reward_that_is_no_number_diverges(gaussian: GaussianModel) -> None:
    """Such a collection teaches nothing."""
    setup = lab(gaussian, BrokenReward)
    tuner = setup.tuner("raft", rollout_size=4, optimizer={"learning_rate": 1e-2})
    before = {name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()}
    with pytest.raises(Diverged, match="reward"):
        tuner.iterate(requests(gaussian, 1))
    assert all(torch.equal(p, before[name]) for name, p in setup.inner.adapter_parameters().items())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("rwr", {}),
        ("rwr", {"weighting": "sparse", "keep": 0.25}),
        ("rwr", {"compare": "collection", "timesteps": "all"}),
        ("raft", {}),
        ("dpo", {"beta": 50.0}),
        ("d3po", {}),
    ],
)
def test_closes_most_of_the_gap_on_a_gaussian(method: str, settings: dict[str, Any]) -> None:
    """A concave reward comes at least six tenths of the way to its best, where plain fine-tuning stays put."""
    assert gap_closed(method, **settings) > 0.6


def test_without_preference_nothing_is_gained() -> None:
    """The same training with uniform weights: what the others gain is the reward's doing."""
    assert abs(gap_closed("rwr", temperature=math.inf)) < 0.3


def gap_closed(method: str, **settings: Any) -> float:
    """Share of the way to the best reward after 25 iterations of 64 pictures."""
    model = GaussianModel()
    setup = lab(model, adapter=0.0, guidance=1.0, micro_batch=64)
    optimizer = {"learning_rate": 2e-2, "weight_decay": 0.0}
    tuner = setup.tuner(method, rollout_size=64, optimizer=optimizer, **settings)
    fresh, size = requests(model, 128, seed=77), tuner.requests_per_iteration
    before = evaluate(setup, QuadraticReward(CPU), fresh)
    stream = requests(model, size * 25)
    for start in range(0, len(stream), size):
        tuner.iterate(stream[start : start + size])
    return (evaluate(setup, QuadraticReward(CPU), fresh) - before) / (0.0 - before)
