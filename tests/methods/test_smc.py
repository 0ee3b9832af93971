"""Steering with particles: resampling and weights by hand, the null identity, and a known tilted Gaussian."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from harness.api import Diverged, Generation, UserError
from harness.sampling import generate
from methods.smc import Swarm, systematic
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import CPU, BrightnessReward, BrokenReward, QuadraticReward, lab, requests
from tests.methods.tilted import assert_tilted

POTENTIALS = ("diff", "max", "add")


@pytest.mark.parametrize(
    ("weights", "uniform", "count", "expected"),
    [
        ([0.5, 0.25, 0.25, 0.0], 0.5, 4, [0, 0, 1, 2]),  # positions 1/8, 3/8, 5/8, 7/8
        ([0.5, 0.25, 0.25, 0.0], 0.0, 4, [0, 0, 1, 2]),  # positions 0, 1/4, 1/2, 3/4
        ([0.0, 0.1, 0.9], 0.0, 3, [1, 2, 2]),  # a weight of 0 is never drawn
        ([0.3, 0.3, 0.4], 0.95, 3, [1, 2, 2]),  # positions 0.317, 0.65, 0.983
        ([0.3, 0.3, 0.4], 0.2, 3, [0, 1, 2]),  # positions 0.067, 0.4, 0.733
        ([0.2, 0.8], 0.1, 1, [0]),
        ([0.2, 0.8], 0.3, 1, [1]),
    ],
)
def test_systematic_resampling_by_hand(weights: list[float], uniform: float, count: int, expected: list[int]) -> None:
    """Indices are those where equally spaced positions fall in the sums of the weights."""
    assert systematic(torch.tensor(weights, dtype=torch.float64), uniform, count).tolist() == expected


def test_systematic_counts_are_within_one_of_their_expectation() -> None:
    """N*w rounded down or up, for any weights and offset; on average over offsets exactly N*w."""
    weights = torch.rand((50, 7), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offsets = [(i + 0.5) / 400 for i in range(400)]
    for w in weights / weights.sum(1, keepdim=True):
        counts = torch.stack([systematic(w, u, 7).bincount(minlength=7) for u in offsets]).double()
        assert (counts >= (7 * w - 1e-9).floor()).all()
        assert (counts <= (7 * w + 1e-9).ceil()).all()
        torch.testing.assert_close(counts.mean(0), 7 * w, rtol=0, atol=1 / 400)


def swarm(tuner: Any, particles: int, columns: int) -> Swarm:
    """The first particles of some requests."""
    start: Swarm = tuner.initial(requests(tuner.model, columns))
    assert start.x.shape == (particles, columns, 3, 1, 1)
    return start


@pytest.mark.parametrize(
    ("potential", "values"),
    [("diff", [[1.0, -3.0], [1.0, 3.0]]), ("max", [[1.0, -3.0], [2.0, 0.0]]), ("add", [[1.0, -3.0], [3.0, -3.0]])],
)
def test_potentials_by_hand(gaussian: GaussianModel, potential: str, values: list[list[float]]) -> None:
    """Rewards 1 then 2 of one particle, -3 then 0 of the other: change, maximum so far, sum so far, times lambda."""
    tuner = lab(gaussian).tuner("smc", potential=potential, lmbda=0.5, particles=2)
    now, total = swarm(tuner, 2, 1), torch.zeros(2)
    for rewards, expected in zip([[1.0, -3.0], [2.0, 0.0]], values, strict=True):
        now = tuner.weigh(now, now.x, torch.tensor(rewards, dtype=torch.float64)[:, None])
        total = total + 0.5 * torch.tensor(expected)
        assert now.log_weight[:, 0].tolist() == pytest.approx(total.tolist())
        assert now.log_product[:, 0].tolist() == pytest.approx(total.tolist())


def test_resampling_waits_for_few_effective_particles(gaussian: GaussianModel) -> None:
    """Above the threshold weights are carried on; below it whole lines are copied and weights start again."""
    tuner = lab(gaussian).tuner("smc", particles=4, ess=0.5)
    batch, start = requests(gaussian, 2), swarm(tuner, 4, 2)
    logs = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64).log().T  # ESS 2, 1.06
    line = torch.arange(8, dtype=torch.float64).view(4, 2)
    after = tuner.resample(Swarm(start.x, logs, line, line + 100), batch, 0)
    assert torch.equal(after.log_weight[:, 0], logs[:, 0])
    assert torch.equal(after.x[:, 0], start.x[:, 0])
    assert after.log_weight[:, 1].tolist() == [0.0] * 4
    ancestors = [int((after.log_product[i, 1] - 1) / 2) for i in range(4)]
    assert ancestors.count(0) >= 3
    assert torch.equal(after.x[:, 1], start.x[ancestors, 1])
    assert torch.equal(after.seen[:, 1], line[ancestors, 1] + 100)


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("select", ["best", "draw"])
def test_lambda_0_is_the_base_sampler(tiny_model: StableDiffusion, potential: str, select: str) -> None:
    """Bit for bit the base model's stochastic sampler with the evaluation's noise, however many particles there are."""
    setup, batch = lab(tiny_model, micro_batch=2), requests(tiny_model, 2)
    for eta in (1.0, 0.3):
        sampler = setup.context.sampler.model_copy(update={"eta": eta})
        expected = generate(tiny_model, batch, Generation(sampler, lora_scale=0.0))
        settings = {"potential": potential, "select": select, "eta": eta, "ess": 1.0}
        generation = Generation(setup.context.sampler)
        latents = setup.tuner("smc", lmbda=0.0, particles=3, **settings).generate(batch, generation)
        assert torch.equal(latents, expected)
        assert torch.equal(setup.tuner("smc", lmbda=5.0, particles=1, **settings).generate(batch, generation), expected)


def test_the_best_particle_is_returned(gaussian: GaussianModel) -> None:
    """Without weighing on the way it is the best of N: more particles only help, and the first of 8 wins 1 in 8 times.

    The share of pictures that the other 7 improve is a binomial's; four standard errors are allowed.
    """
    setup, batch = lab(gaussian), requests(gaussian, 200)
    scores = []
    for particles in (1, 2, 4, 8):
        tuner = setup.tuner("smc", particles=particles, resample_at=())
        latents = tuner.generate(batch, Generation(setup.context.sampler))
        scores.append(QuadraticReward(CPU)(latents, []))
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(scores))
    improved = float((scores[-1] > scores[0]).double().mean())
    assert improved == pytest.approx(7 / 8, abs=4 * (7 / 64 / 200) ** 0.5)


@pytest.mark.parametrize("settings", [{"particles": 2}, {"particles": 3, "resample_at": (0.0, 0.3), "ess": 0.0}])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_costs_what_it_planned(tiny_model: StableDiffusion, settings: dict[str, Any], guidance: float) -> None:
    """The meter shows the plan, whether or not particles were resampled; no gradient is taken."""
    setup = lab(tiny_model, BrightnessReward, guidance=guidance, micro_batch=2)
    tuner = setup.tuner("smc", **settings)
    tuner.generate(requests(tiny_model, 3), Generation(setup.context.sampler))
    assert setup.meter.cost == tuner.planned_cost().expected * 3
    assert setup.meter.cost.gradient_rows == setup.meter.cost.reward_gradients == 0


@pytest.mark.parametrize(("steps", "expected"), [(4, [0, 1, 2]), (10, [2, 4, 6, 8]), (100, [20, 40, 60, 80])])
def test_where_particles_are_weighed(gaussian: GaussianModel, steps: int, expected: list[int]) -> None:
    """At the released code's steps of 100, and at those fractions of any chain; the last step is weighed anyway."""
    setup = lab(gaussian, steps=steps)
    assert setup.tuner("smc").weighed(setup.context.sampler) == expected


def test_pictures_belong_to_requests_and_seeds(gaussian: GaussianModel) -> None:
    """A picture does not depend on its batch or on autograd; another seed has other particles."""
    setup, batch, settings = lab(gaussian), requests(gaussian, 6), {"lmbda": 3.0, "select": "draw"}
    generation = Generation(setup.context.sampler)
    whole = setup.tuner("smc", **settings).generate(batch, generation)
    with torch.no_grad():
        single = lab(gaussian, micro_batch=1).tuner("smc", **settings).generate(batch[::-1], generation).flip(0)
    torch.testing.assert_close(single, whole, rtol=1e-12, atol=1e-12)
    assert not torch.equal(lab(gaussian, seed=1).tuner("smc", **settings).generate(batch, generation), whole)


def test_reaches_the_tilted_gaussian() -> None:
    """Pictures drawn by weight have mean and deviation of p_base * exp(lambda*r), within four standard errors."""
    assert_tilted("diff", particles=32, pictures=150)


def test_what_is_refused(gaussian: GaussianModel) -> None:
    """Fractions outside the chain, and a reward that is not finite."""
    with pytest.raises(UserError, match="fractions of the chain"):
        lab(gaussian).tuner("smc", resample_at=(0.5, 1.0))
    setup = lab(gaussian, BrokenReward)
    with pytest.raises(Diverged):
        setup.tuner("smc").generate(requests(gaussian, 2), Generation(setup.context.sampler))
