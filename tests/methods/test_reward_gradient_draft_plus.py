"""DRaFT+: DRaFT-K, and the gradient of its distance to the base model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from harness.api import BASE, Adapter, Randomness, UserError
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import assert_close, distance, gradients, lab, mean_reward, reference_chain, reference_noise, requests


@pytest.mark.parametrize("k", [1, 3])
def test_without_a_penalty_it_is_draft_k(tiny_model: StableDiffusion, k: int) -> None:
    """Bit for bit at beta 0, at the same cost; with a penalty it is not."""
    batch = requests(tiny_model, 2)
    setups = [lab(tiny_model, checkpointing="on") for _ in range(3)]
    draft = gradients(setups[0].tuner("draft-k", batch_size=2, k=k), batch)
    plain = gradients(setups[1].tuner("draft-plus", batch_size=2, k=k, beta=0.0), batch)
    assert all(torch.equal(plain[name], draft[name]) for name in draft)
    assert setups[1].meter.cost == setups[0].meter.cost
    penalised = gradients(setups[2].tuner("draft-plus", batch_size=2, k=k, beta=1.0), batch)
    assert distance(penalised, draft) > 1e-3
    assert setups[2].meter.cost.forward_rows == setups[0].meter.cost.forward_rows + 4 * k


@pytest.mark.parametrize("k", [1, 2])
def test_the_penalty_equals_finite_differences(tiny_model: StableDiffusion, k: int) -> None:
    """The mean squared difference of guided noises over the last K steps, the base's noises constant."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    at = {name: p.detach().clone() for name, p in tiny_model.adapter_parameters().items()}
    tuner = setup.tuner("draft-plus", batch_size=2, k=k, beta=3.0)
    texts = [request.prompt.text for request in batch]
    fixed = [Adapter(parameters=at)] * 4
    start = reference_chain(tiny_model, batch, setup.context.sampler, fixed).detach()
    x = torch.stack([request.noise for request in batch]).double()
    references: list[Tensor] = []

    def objective(moved: Mapping[str, Tensor], record: bool = False) -> float:
        latents, penalty = x, torch.zeros(())
        for i, step in enumerate(tuner.steps):
            last = i >= 4 - k
            adapter = Adapter(parameters=moved if last else at)
            noise = reference_noise(tiny_model, latents, step.t, texts, 4.0, adapter)
            if last and record:
                references.append(reference_noise(tiny_model, latents, step.t, texts, 4.0, BASE))
            if last:
                penalty = penalty + (noise - references[i - 4 + k]).square().mean() / k
            latents = step.alpha_next * (latents - step.sigma * noise) / step.alpha + step.sigma_next * noise
        if record:
            assert torch.allclose(latents, start)
        return float(-mean_reward(setup, latents, batch) + 3.0 * penalty)

    direction = {name: Randomness(5).normal(p.shape, name, dtype=p.dtype) for name, p in at.items()}
    with torch.no_grad():
        value = objective(at, record=True)
        ahead, behind = (objective({n: p + h * direction[n] for n, p in at.items()}) for h in (2e-5, -2e-5))
    metrics = tuner.iterate(batch)
    found = tiny_model.adapter_parameters()
    along = float(sum((p.grad * direction[name]).sum() for name, p in found.items() if p.grad is not None))
    assert along == pytest.approx((ahead - behind) / 4e-5, rel=1e-5)
    assert metrics["loss"] == pytest.approx(value, rel=1e-10)


def test_the_penalty_by_hand(gaussian: GaussianModel) -> None:
    """On the Gaussian the two noises differ by bias + gain*x_1."""
    setup = lab(gaussian, guidance=1.0)
    batch = requests(gaussian, 5)
    metrics = setup.tuner("draft-plus", batch_size=5, beta=0.5).iterate(batch)
    bias, gain = (gaussian.adapter_parameters()[name].detach() for name in ("bias", "gain"))
    x = torch.stack([request.noise for request in batch]).double()
    for step in setup.tuner("draft").steps[:-1]:
        noise = gaussian.denoise(x, step.t, gaussian.condition(["a"]), Adapter()).detach()
        x = step.alpha_next * (x - step.sigma * noise) / step.alpha + step.sigma_next * noise
    expected = 0.5 * float((bias + gain * x).square().mean())
    assert metrics["loss"] + metrics["reward"] == pytest.approx(expected, rel=1e-12)


def test_at_the_base_it_is_draft_k(tiny_model: StableDiffusion) -> None:
    """Where the adapter changes nothing the penalty is 0 and so is its gradient."""
    setup = lab(tiny_model, adapter=0.0)
    batch = requests(tiny_model, 2)
    found = gradients(setup.tuner("draft-plus", batch_size=2, k=2, beta=100.0), batch)
    assert_close(found, gradients(setup.tuner("draft-k", batch_size=2, k=2), batch), 1e-12)


def test_checkpointing_changes_nothing(tiny_model: StableDiffusion) -> None:
    """The penalised noise is an output of the recomputed step."""
    batch = requests(tiny_model, 2)
    found = [
        gradients(lab(tiny_model, checkpointing=how).tuner("draft-plus", batch_size=2, k=3, beta=2.0), batch)
        for how in ("off", "on")
    ]
    assert_close(found[1], found[0], 1e-12)


def test_the_penalty_holds_the_adapter_back(gaussian: GaussianModel) -> None:
    """After the same updates a larger beta leaves the adapter closer to the base."""
    size = []
    for beta in (0.0, 1.0, 10.0):
        setup = lab(gaussian, adapter=0.0, guidance=1.0)
        tuner = setup.tuner(
            "draft-plus", batch_size=4, beta=beta, optimizer={"learning_rate": 2e-2, "weight_decay": 0.0}
        )
        for seed in range(60):
            tuner.iterate(requests(gaussian, 4, seed))
        size.append(float(sum(p.detach().square().sum() for p in gaussian.adapter_parameters().values())))
    assert size[0] > 1.5 * size[1] > 1.5 * 1.5 * size[2]


def test_more_steps_than_the_chain_has_are_refused(gaussian: GaussianModel) -> None:
    """Named, with what to change."""
    with pytest.raises(UserError, match=r"draft-plus\.k=5"):
        lab(gaussian).tuner("draft-plus", k=5)
