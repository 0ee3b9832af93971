"""The meter: what it counts, and as which kind."""

from __future__ import annotations

import pytest
import torch

from harness.api import Adapter, Cost, Prompt
from harness.metering import Meter, TrainingReward
from harness.sampling import initial_latents, sample
from models.gaussian import GaussianModel
from tests.fakes import CPU, BrightnessReward, Lab, QuadraticReward, lab, requests


def run(setup: Lab, pictures: int, **options: object) -> torch.Tensor:
    """A chain on the metered model."""
    batch = requests(setup.inner, pictures)
    condition = setup.model.condition([r.prompt.text for r in batch])
    return sample(setup.model, initial_latents(setup.model, batch), condition, setup.context.sampler, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("guidance", "branches"), [(1.0, 1), (4.0, 2), (0.0, 2)])
def test_rows_by_kind(gaussian: GaussianModel, guidance: float, branches: int) -> None:
    """Steps without gradient, with it, and passed by backward are counted apart; guidance counts each row twice."""
    setup = lab(gaussian, guidance=guidance)
    latents = run(setup, 3, gradient_steps=1)
    assert setup.meter.cost == Cost(forward_rows=9 * branches, gradient_rows=3 * branches)
    latents.sum().backward()
    assert setup.meter.cost == Cost(forward_rows=9 * branches, gradient_rows=3 * branches, backward_rows=3 * branches)


def test_recomputed_rows_are_counted_when_they_are_recomputed(gaussian: GaussianModel) -> None:
    """Checkpointed steps cost their rows again, in the backward pass, and not before."""
    setup = lab(gaussian)
    latents = run(setup, 2, gradient_steps=3, checkpointing=True)
    assert setup.meter.cost == Cost(forward_rows=4, gradient_rows=12)
    latents.sum().backward()
    assert setup.meter.cost == Cost(forward_rows=4, gradient_rows=12, recomputed_rows=12, backward_rows=12)


def test_no_gradient_no_gradient_rows(gaussian: GaussianModel) -> None:
    """Under no_grad all rows are forward rows, whatever the chain was asked for."""
    setup = lab(gaussian)
    with torch.no_grad():
        run(setup, 2, gradient_steps=4)
    assert setup.meter.cost == Cost(forward_rows=16)


def test_pictures_and_queries(gaussian: GaussianModel) -> None:
    """Each component of a weighted sum is a query per picture; only what a backward reaches is a reward gradient."""
    meter = Meter()
    reward = TrainingReward([(2.0, QuadraticReward(CPU)), (-0.5, BrightnessReward(CPU))], meter, "2*q-0.5*b")
    pictures = torch.rand((3, 3, 2, 2), generator=torch.Generator().manual_seed(0)).requires_grad_()
    prompts = [Prompt("p", "a")] * 3
    scores = reward(pictures, prompts)
    assert meter.cost == Cost(queries=6)
    scores.sum().backward()
    assert meter.cost == Cost(queries=6, reward_gradients=3)
    expected = 2 * QuadraticReward(CPU)(pictures, prompts) - 0.5 * BrightnessReward(CPU)(pictures, prompts)
    torch.testing.assert_close(scores, expected)
    assert reward.components == 2
    assert reward.differentiable is False


def test_decodes_are_counted(gaussian: GaussianModel) -> None:
    """One for each latent."""
    setup = lab(gaussian)
    setup.model.decode(torch.zeros(5, 3, 1, 1))
    assert setup.meter.cost == Cost(decodes=5)


def test_metering_changes_no_number(gaussian: GaussianModel) -> None:
    """The metered model says what the model says."""
    setup = lab(gaussian)
    x = torch.ones(2, 3, 1, 1, dtype=torch.float64)
    condition = gaussian.condition(["a", "b"])
    plain = gaussian.predict(x, 300, condition, guidance=4.0, adapter=Adapter(scale=0.3))
    metered = setup.model.predict(x, 300, condition, guidance=4.0, adapter=Adapter(scale=0.3))
    assert torch.equal(metered.x0, plain.x0)
    assert setup.model.fingerprint() == gaussian.fingerprint()


def test_costs_add_up() -> None:
    """Costs are vectors; all passes of rows together are the denoiser's rows."""
    cost = Cost(forward_rows=1, gradient_rows=2, recomputed_rows=3, backward_rows=4, decodes=5, queries=6)
    assert cost.denoiser_rows == 10
    assert cost + cost == cost * 2
    assert cost - cost == Cost()
