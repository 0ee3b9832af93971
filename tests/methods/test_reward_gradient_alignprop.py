"""AlignProp: at each K the gradient of DRaFT-K, and K drawn as its sources say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.api import Adapter, Randomness, UserError
from harness.sampling import schedule
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import assert_close, distance, gradients, lab, mean_reward, requests


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("k", [1, 3])
def test_at_a_fixed_k_it_is_draft_k(tiny_model: StableDiffusion, k: int) -> None:
    """Bit for bit, and with another K it is not."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 3)
    found = gradients(setup.tuner("alignprop", batch_size=3, k_min=k, k_max=k, eta=0.0), batch)
    assert same(found, gradients(setup.tuner("draft-k", batch_size=3, k=k), batch))
    assert distance(found, gradients(setup.tuner("draft-k", batch_size=3, k=k + 1), batch)) > 1e-3


@pytest.mark.parametrize("k", [1, 2, 4])
def test_at_a_fixed_k_it_is_draft_k_with_noise(gaussian: GaussianModel, k: int) -> None:
    """The same with a stochastic sampler, whose noise both read under the same keys."""
    noisy, still = lab(gaussian, eta=1.0), lab(gaussian)
    batch = requests(gaussian, 3)
    found = gradients(still.tuner("alignprop", batch_size=3, k_min=k, k_max=k), batch)
    assert same(found, gradients(noisy.tuner("draft-k", batch_size=3, k=k), batch))
    assert distance(found, gradients(still.tuner("draft-k", batch_size=3, k=k), batch)) > 1e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_is_the_gradient_with_early_predictions_detached(gaussian: GaussianModel, eta: float) -> None:
    """Each trajectory written out with a graph everywhere, its predictions before the last K steps detached."""
    setup = lab(gaussian, steps=6)
    batch = requests(gaussian, 5)
    tuner = setup.tuner("alignprop", batch_size=5, eta=eta)
    draws = setup.context.randomness.child("iteration", batch[0].noise_id)
    ks = [tuner.drawn(request, draws) for request in batch]
    assert len(set(ks)) > 1
    copy = {name: p.detach().clone().requires_grad_() for name, p in gaussian.adapter_parameters().items()}
    sampler = setup.context.sampler.model_copy(update={"eta": eta})
    losses = []
    for request, k in zip(batch, ks, strict=True):
        x = request.noise[None].double()
        for step in schedule(gaussian, sampler):
            noise = gaussian.denoise(x, step.t, gaussian.condition(["a"]), Adapter(parameters=copy))
            noise = noise.detach() if step.index < 6 - k else noise
            direction = (step.sigma_next**2 - step.std**2) ** 0.5
            x = step.alpha_next * (x - step.sigma * noise) / step.alpha + direction * noise
            keys = ("step", request.prompt.id, request.noise_id, step.index)
            x = x + step.std * setup.context.randomness.normal((1, 3, 1, 1), *keys, dtype=torch.float64)
        losses.append(-mean_reward(setup, x, [request]))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(copy.values()))
    assert_close(gradients(tuner, batch), dict(zip(copy, found, strict=True)), 1e-12)


def test_pictures_do_not_depend_on_the_batch(gaussian: GaussianModel) -> None:
    """K and noise belong to a request: any split gives the same gradient."""
    batch = requests(gaussian, 7)
    whole = gradients(lab(gaussian, steps=6).tuner("alignprop", batch_size=7), batch)
    for micro_batch in (1, 3):
        split = gradients(lab(gaussian, steps=6, micro_batch=micro_batch).tuner("alignprop", batch_size=7), batch)
        assert_close(split, whole, 1e-12)


@pytest.mark.parametrize("draw", ["uniform", "gaussian"])
def test_k_is_drawn_as_the_released_code_draws_it(gaussian: GaussianModel, draw: str) -> None:
    """Against the code's own rule, simulated: the first step with gradient is redrawn unless 1 <= t_b < T."""
    tuner = lab(gaussian, steps=50).tuner("alignprop", draw=draw)
    count = 20_000
    if draw == "gaussian":
        starts = (42 + 5 * Randomness(1).normal((count,), "t_b", dtype=torch.float64)).trunc()
    else:
        starts = torch.tensor([Randomness(1).integer("t_b", i, below=50) for i in range(count)])
    starts = starts[(starts >= 1) & (starts < 50)]
    simulated = Counter((50 - starts).int().tolist())
    mine = Counter(tuner.drawn(request, Randomness(2).child(i)) for i, request in enumerate(requests(gaussian, count)))
    assert set(mine) <= set(range(1, 50))
    for k in range(1, 50):
        expected = tuner.weights[k - 1] / sum(tuner.weights)
        for seen, of in ((simulated[k], len(starts)), (mine[k], count)):
            assert abs(seen / of - expected) <= 5 * (expected * (1 - expected) / of) ** 0.5 + 1 / of


def test_one_k_for_a_trajectory_or_for_an_update(gaussian: GaussianModel) -> None:
    """`per` says what shares a draw; the next update draws anew."""
    setup = lab(gaussian, steps=20)
    batch = requests(gaussian, 12)
    found = {}
    for per in ("trajectory", "update"):
        tuner = setup.tuner("alignprop", per=per)
        found[per] = [[tuner.drawn(r, Randomness(0).child("iteration", i)) for r in batch] for i in range(12)]
    assert all(len(set(ks)) > 1 for ks in found["trajectory"])
    assert all(len(set(ks)) == 1 for ks in found["update"])
    assert len({ks[0] for ks in found["update"]}) > 1


def test_it_is_evaluated_with_its_own_sampler(gaussian: GaussianModel) -> None:
    """The noise of its training sampler is a setting, 1 as in the released code."""
    setup = lab(gaussian)
    assert setup.context.sampler.eta == 0.0
    assert setup.tuner("alignprop").training_sampler.eta == 1.0
    assert setup.tuner("alignprop", eta=0.0).training_sampler.eta == 0.0


@pytest.mark.parametrize(
    "settings", [{"k_max": 5}, {"k_min": 4}, {"k_min": 3, "k_max": 2}, {"draw": "gaussian", "mean": 100.0}]
)
def test_ks_that_cannot_be_drawn_are_refused(gaussian: GaussianModel, settings: dict[str, Any]) -> None:
    """Named, with what to change."""
    with pytest.raises(UserError, match="alignprop"):
        lab(gaussian).tuner("alignprop", **settings)


def test_a_chain_of_one_step_is_trained_whole(gaussian: GaussianModel) -> None:
    """T = 1 leaves K = 1."""
    assert list(lab(gaussian, steps=1).tuner("alignprop").ks) == [1]
