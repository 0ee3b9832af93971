"""Reward gradients: every method's update is the gradient that its formula says, no more and no less."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import BASE, Adapter, CostRange, Diverged, Randomness, Request, UserError
from harness.sampling import Step, Transition, sample
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import (
    CPU,
    BrokenReward,
    InfiniteReward,
    Lab,
    QuadraticReward,
    assert_close,
    distance,
    gradients,
    lab,
    mean_reward,
    reference_chain,
    reference_noise,
    requests,
)


def parameters(lab: Lab) -> dict[str, Tensor]:
    """Copies of the adapter's parameters."""
    return {name: p.detach().clone() for name, p in lab.inner.adapter_parameters().items()}


def descent(lab: Lab, batch: Sequence[Request], per_step: bool = False) -> list[dict[str, Tensor]]:
    """Gradient of minus the mean reward by full backpropagation through the reference chain.

    One entry for each step: the part of the gradient that its own use of the adapter gives.
    """
    steps = lab.context.sampler.steps
    copies = [{name: p.requires_grad_() for name, p in parameters(lab).items()} for _ in range(steps)]
    latents = reference_chain(lab.inner, batch, lab.context.sampler, [Adapter(parameters=copy) for copy in copies])
    flat = [p for copy in copies for p in copy.values()]
    found = iter(torch.autograd.grad(-mean_reward(lab, latents, batch), flat))
    return [{name: next(found) for name in copy} for copy in copies]


def total(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of gradients."""
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def directional(reward: Callable[[Mapping[str, Tensor]], Tensor], at: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """Central difference of minus the reward along a random direction, and that direction."""
    direction = {name: Randomness(5).normal(p.shape, "direction", name, dtype=p.dtype) for name, p in at.items()}
    h = 1e-4
    with torch.no_grad():
        ahead, behind = (reward({n: p + sign * h * direction[n] for n, p in at.items()}) for sign in (1, -1))
    return -(ahead - behind) / (2 * h), direction


def along(gradient: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> float:
    """Inner product over all parameters."""
    return float(sum((gradient[name] * direction[name]).sum() for name in direction))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draft_is_full_backpropagation(tiny_model: StableDiffusion, guidance: float) -> None:
    """DRaFT's gradient is that of the whole chain written out without it; DRaFT-K with K = T is the same."""
    setup = lab(tiny_model, guidance=guidance)
    batch = requests(tiny_model, 3)
    full = total(descent(setup, batch))
    assert_close(gradients(setup.tuner("draft", batch_size=3), batch), full)
    assert_close(gradients(setup.tuner("draft-k", batch_size=3, k=4), batch), full)


def test_truncated_gradients_are_nested(tiny_model: StableDiffusion) -> None:
    """DRaFT-K's gradient is the sum of the last K steps' own parts of the full gradient, for every K."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    parts = descent(setup, batch)
    for k in (1, 2, 3, 4):
        assert_close(gradients(setup.tuner("draft-k", batch_size=2, k=k), batch), total(parts[-k:]))
    assert distance(total(parts[-1:]), total(parts)) > 0.1


@pytest.mark.parametrize(("method", "settings", "recomputed"), [("draft", {}, 4), ("draft-k", {"k": 2}, 2)])
def test_checkpointing_changes_nothing(
    tiny_model: StableDiffusion, method: str, settings: dict[str, Any], recomputed: int
) -> None:
    """Recomputed activations give the same gradient, and the meter shows the rows that it took."""
    batch = requests(tiny_model, 2)
    kept, again = lab(tiny_model, checkpointing="off"), lab(tiny_model, checkpointing="on")
    found = [gradients(setup.tuner(method, batch_size=2, **settings), batch) for setup in (kept, again)]
    assert_close(found[1], found[0], 1e-12)
    assert kept.meter.cost.recomputed_rows == 0
    assert again.meter.cost.recomputed_rows == 2 * 2 * recomputed


@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradient_equals_finite_differences(tiny_model: StableDiffusion, k: int) -> None:
    """Through UNet, guidance, decoder and reward: moving the parameters of the last K steps changes the reward so."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    at = parameters(setup)

    def reward(moved: Mapping[str, Tensor]) -> Tensor:
        adapters = [Adapter(parameters=at if step < 4 - k else moved) for step in range(4)]
        return mean_reward(setup, reference_chain(setup.inner, batch, setup.context.sampler, adapters), batch)

    expected, direction = directional(reward, at)
    tuners = [setup.tuner("draft-k", batch_size=2, k=k)] + ([setup.tuner("draft", batch_size=2)] if k == 4 else [])
    for tuner in tuners:
        assert along(gradients(tuner, batch), direction) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("m", [1, 4])
def test_refl_equals_finite_differences(tiny_model: StableDiffusion, m: int) -> None:
    """ReFL's gradient is that of the one-step prediction at the step that was drawn, the state before it fixed."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    at = parameters(setup)
    tuner = setup.tuner("refl", batch_size=2, m=m)
    index = 3 - setup.context.randomness.child("iteration", batch[0].noise_id).integer("t", below=m)
    step = tuner.steps[index]
    texts = [request.prompt.text for request in batch]
    guidance = setup.context.sampler.guidance
    with torch.no_grad():
        x_t = torch.stack([r.noise for r in batch]).double()
        for earlier in tuner.steps[:index]:
            noise = reference_noise(setup.inner, x_t, earlier.t, texts, guidance, Adapter())
            x0 = (x_t - earlier.sigma * noise) / earlier.alpha
            x_t = earlier.alpha_next * x0 + earlier.sigma_next * noise

    def reward(moved: Mapping[str, Tensor]) -> Tensor:
        noise = reference_noise(setup.inner, x_t, step.t, texts, guidance, Adapter(parameters=moved))
        return mean_reward(setup, (x_t - step.sigma * noise) / step.alpha, batch)

    expected, direction = directional(reward, at)
    assert along(gradients(tuner, batch), direction) == pytest.approx(float(expected), rel=1e-5)


class Detached(RewardGradientTuner[RewardGradientConfig]):
    """Deliberately wrong: the chain is cut before the last step."""

    version, stochastic, needs_reward_gradient, Config = "1", False, True, RewardGradientConfig

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """As DRaFT, but for the detach."""
        x = self.chain(batch, gradient_steps=4, stop=3).detach()
        last = self.steps[-1]
        prediction = self.model.predict(
            x, last.t, batch.condition, guidance=self.context.sampler.guidance, adapter=Adapter()
        )
        reward = self.score(last.alpha_next * prediction.x0 + last.sigma_next * prediction.noise, batch)
        return Objective(loss=-reward, reward=reward)

    def planned_cost(self) -> CostRange:
        """As DRaFT."""
        return self.truncated_cost(4)


class Clamped(RewardGradientTuner[RewardGradientConfig]):
    """Deliberately wrong: pictures are clamped before the reward."""

    version, stochastic, needs_reward_gradient, Config = "1", False, True, RewardGradientConfig

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """As DRaFT, but for the clamp."""
        pictures = self.model.decode(self.chain(batch, gradient_steps=4)).clamp(0.3, 0.7)
        reward = self.reward(pictures, [request.prompt for request in batch.requests])
        return Objective(loss=-reward, reward=reward)

    def planned_cost(self) -> CostRange:
        """As DRaFT."""
        return self.truncated_cost(4)


@pytest.mark.parametrize("broken", [Detached, Clamped])
def test_a_planted_detach_or_clamp_is_seen(tiny_model: StableDiffusion, broken: type) -> None:
    """The checks above can fail: a chain that is cut, or a clamp, differs by far more than their tolerance."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    at = parameters(setup)

    def reward(moved: Mapping[str, Tensor]) -> Tensor:
        adapters = [Adapter(parameters=moved)] * 4
        return mean_reward(setup, reference_chain(setup.inner, batch, setup.context.sampler, adapters), batch)

    expected, direction = directional(reward, at)
    found = along(gradients(setup.tuner(broken, batch_size=2), batch), direction)
    assert abs(found - float(expected)) > 1e-2 * abs(float(expected))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_refl_with_one_step_is_draft_1(tiny_model: StableDiffusion, guidance: float) -> None:
    """With a clean final target the last step is the one-step prediction; with the first level as target it is not."""
    batch = requests(tiny_model, 2)
    found = {}
    for final in ("one", "first"):
        setup = lab(tiny_model, guidance=guidance, final_alpha=final)
        refl = gradients(setup.tuner("refl", batch_size=2, m=1), batch)
        found[final] = distance(refl, gradients(setup.tuner("draft-k", batch_size=2, k=1), batch))
    assert found["one"] < 1e-12
    assert found["first"] > 1e-4


def test_refl_hinge_stops_at_the_hinge(gaussian: GaussianModel) -> None:
    """Rewards above the hinge give no gradient; below it the gradient is the plain one."""
    setup = lab(gaussian)
    batch = requests(gaussian, 4)
    plain = gradients(setup.tuner("refl", batch_size=4, m=2), batch)
    assert_close(gradients(setup.tuner("refl", batch_size=4, m=2, hinge=10.0), batch), plain, 1e-12)
    above = gradients(setup.tuner("refl", batch_size=4, m=2, hinge=-100.0), batch)
    assert all(bool((g == 0).all()) for g in above.values())


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("level", [None, 130])
def test_draft_lv_by_hand(tiny_model: StableDiffusion, keep_base: bool, reduction: str, level: int | None) -> None:
    """The gradient is that of the base term (where kept) and the n re-denoised terms, summed or averaged."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    tuner = setup.tuner("draft-lv", batch_size=2, n=2, keep_base=keep_base, reduction=reduction, level=level)
    copy = {name: p.requires_grad_() for name, p in parameters(setup).items()}
    adapter = Adapter(parameters=copy)
    before = Adapter(parameters={name: p.detach() for name, p in copy.items()})
    x_0 = reference_chain(setup.inner, batch, setup.context.sampler, [before, before, before, adapter])
    rewards = [mean_reward(setup, x_0, batch)] if keep_base else []
    t = tuner.steps[-1].t if level is None else level
    alpha, sigma = setup.inner.alpha_sigma(t)
    for i in range(2):
        fresh = [
            setup.context.randomness.normal(setup.inner.latent_shape, "renoise", r.prompt.id, r.noise_id, i)
            for r in batch
        ]
        x = alpha * x_0.detach() + sigma * torch.stack(fresh).double()
        noise = reference_noise(setup.inner, x, t, [r.prompt.text for r in batch], 4.0, adapter)
        rewards.append(mean_reward(setup, (x - sigma * noise) / alpha, batch))
    loss = -torch.stack(rewards).sum() if reduction == "sum" else -torch.stack(rewards).mean()
    expected = dict(zip(copy, torch.autograd.grad(loss, list(copy.values())), strict=True))
    metrics = tuner.iterate(batch)
    found = {name: p.grad for name, p in setup.inner.adapter_parameters().items() if p.grad is not None}
    assert_close(found, expected)
    assert metrics["reward"] == pytest.approx(rewards[0].item(), abs=1e-12)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-12)


def test_draft_lv_renoises_each_loop_anew(gaussian: GaussianModel) -> None:
    """The n noises of a picture differ, and so do those of the same loop in two pictures."""
    tuner = lab(gaussian).tuner("draft-lv", batch_size=2)
    batch = requests(gaussian, 2)
    inputs = Batch(batch, torch.zeros(2, 3, 1, 1, dtype=torch.float64), gaussian.condition(["a", "b"]))
    drawn = torch.cat([tuner.fresh_noise(inputs, i) for i in range(3)]).flatten().tolist()
    assert len(set(drawn)) == len(drawn)


ALL = [("draft", {}), ("draft-k", {"k": 2}), ("draft-lv", {}), ("refl", {"m": 3})]


@pytest.mark.parametrize(("method", "settings"), ALL)
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_results_do_not_depend_on_micro_batches(
    tiny_model: StableDiffusion, method: str, settings: dict[str, Any], micro_batch: int
) -> None:
    """Five requests at once, in twos or one by one have the same gradient."""
    batch = requests(tiny_model, 5)
    whole = gradients(lab(tiny_model).tuner(method, batch_size=5, **settings), batch)
    split = gradients(lab(tiny_model, micro_batch=micro_batch).tuner(method, batch_size=5, **settings), batch)
    assert_close(split, whole, 1e-9)


@pytest.mark.parametrize("start", [0, 2])
def test_adapter_strength_survives_checkpointing(tiny_model: StableDiffusion, start: int) -> None:
    """Scale 0.5 (0 before the start step) and a penalty that calls the base are recomputed as they were.

    A strength that is set around the call, not in it, is forgotten until the backward pass recomputes the call.
    """
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    x = torch.stack([r.noise for r in batch]).double()
    condition = tiny_model.condition([r.prompt.text for r in batch])
    config = setup.context.sampler

    def adapter(step: Step) -> Adapter:
        return Adapter(scale=0.5 if step.index >= start else 0.0)

    found = []
    for checkpointing in (False, True):
        penalties: list[Tensor] = []

        def penalise(step: Step, x_t: Tensor, policy: Transition, x_next: Tensor, to: list[Tensor] = penalties) -> None:
            noises = [
                setup.model.predict(x_t, step.t, condition, guidance=config.guidance, adapter=chosen).noise
                for chosen in (adapter(step), BASE)
            ]
            to.append((noises[0] - noises[1]).square().mean())

        latents = sample(
            setup.model,
            x,
            condition,
            config,
            adapter=adapter,
            gradient_steps=4,
            checkpointing=checkpointing,
            observe=penalise,
        )
        assert penalties[-1] > 0
        objective = mean_reward(setup, latents, batch) - 0.1 * torch.stack(penalties).sum()
        trained = setup.inner.adapter_parameters()
        gradient = torch.autograd.grad(objective, list(trained.values()))
        found.append(dict(zip(trained, gradient, strict=True)))
    assert_close(found[1], found[0], 1e-12)


@pytest.mark.parametrize("reward", [BrokenReward, InfiniteReward])
def test_a_reward_that_is_not_finite_diverges(gaussian: GaussianModel, reward: type) -> None:
    """Nothing is applied, even where the gradient is finite."""
    setup = lab(gaussian, reward)
    before = parameters(setup)
    tuner = setup.tuner("draft", batch_size=2, optimizer={"learning_rate": 0.1})
    with pytest.raises(Diverged, match="reward"):
        tuner.iterate(requests(gaussian, 2))
    assert all(torch.equal(after, before[name]) for name, after in parameters(setup).items())


def test_the_reward_shown_is_that_of_the_pictures(gaussian: GaussianModel) -> None:
    """The `reward` metric is the mean over the requests of the pictures before the update."""
    setup = lab(gaussian, micro_batch=2)
    batch = requests(gaussian, 5)
    latents = reference_chain(gaussian, batch, setup.context.sampler, [Adapter()] * 4)
    expected = float(QuadraticReward(CPU)(latents, [r.prompt for r in batch]).mean())
    assert setup.tuner("draft", batch_size=5).iterate(batch)["reward"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("method", "settings"), [("draft-k", {"k": 5}), ("refl", {"m": 5}), ("draft-lv", {"level": 1000})]
)
def test_settings_beyond_the_chain_are_refused(gaussian: GaussianModel, method: str, settings: dict[str, Any]) -> None:
    """More steps than the sampler has, or a timestep that is none, are the user's mistake and named."""
    with pytest.raises(UserError, match=method):
        lab(gaussian).tuner(method, **settings)
