"""DRaFT-LV: what its re-noised terms estimate, how noisy they are, and the options of its levels."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.api import Adapter, Request, TrainedFineTuner, UserError
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import Lab, assert_close, gradients, lab, mean_reward, reference_chain, reference_noise, requests


def term(setup: Lab, x: Tensor) -> dict[str, Tensor]:
    """Gradient of minus the reward of the one-step prediction from x at the last step, by hand."""
    step = setup.tuner("draft").steps[-1]
    bias, gain = (setup.inner.adapter_parameters()[name].detach() for name in ("bias", "gain"))
    slope = step.sigma / (step.alpha**2 * 0.25 + step.sigma**2)
    x_0 = (x - step.sigma * (slope * (x - step.alpha * 0.3) + bias + gain * x)) / step.alpha
    back = 2 * (x_0 - 0.8) / 3 * -step.sigma / step.alpha
    return {"bias": back, "gain": back * x}


def test_its_terms_are_unbiased_at_the_renoised_state_alone(gaussian: GaussianModel) -> None:
    """The mean over the noise is the exact expectation at x_1 = alpha*x_0 + sigma*eps, and not DRaFT-1's gradient."""
    setup = lab(gaussian, guidance=1.0)
    (request,) = requests(gaussian, 1)
    step = setup.tuner("draft").steps[-1]
    fixed = [Adapter(parameters={n: p.detach() for n, p in gaussian.adapter_parameters().items()})] * 4
    x_0 = reference_chain(gaussian, [request], setup.context.sampler, fixed)[0]
    # The term is a polynomial of degree 2 in eps: three nodes of Gauss-Hermite quadrature are exact.
    nodes = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
    terms = [term(setup, step.alpha * x_0 + step.sigma * node) for node in nodes]
    exact = {n: (terms[0][n] + 4 * terms[1][n] + terms[2][n]) / 6 for n in terms[0]}
    n = 500
    loops = setup.tuner("draft-lv", batch_size=1, n=n, keep_base=False, reduction="mean")
    found = gradients(loops, [request])
    draft = gradients(setup.tuner("draft-k", batch_size=1, k=1), [request])
    for name, value in exact.items():
        spread = sum(w * (t[name] - value).square() for w, t in zip((1, 4, 1), terms, strict=True)) / 6
        error = (spread / n).sqrt()
        assert bool(((found[name] - value).abs() < 5 * error).all())
    bias = float(sum((exact[name] - draft[name]).square().sum() for name in exact)) ** 0.5
    size = float(sum(draft[name].square().sum() for name in exact)) ** 0.5
    assert bias > 0.01 * size


def spread(tuner: TrainedFineTuner, batches: Sequence[Sequence[Request]]) -> float:
    """Variance of the gradient over batches, summed over parameters."""
    found = [torch.cat([g.flatten() for g in gradients(tuner, batch).values()]) for batch in batches]
    return float(torch.stack(found).var(0).sum())


def test_more_loops_have_less_variance(gaussian: GaussianModel) -> None:
    """At one x_0, the variance over the loops' noise falls as 1/n."""
    setup = lab(gaussian, guidance=1.0)
    base = requests(gaussian, 1)[0]
    same = [[Request(base.prompt, i, base.noise)] for i in range(200)]
    one, four = (
        spread(setup.tuner("draft-lv", batch_size=1, n=n, keep_base=False, reduction="mean"), same) for n in (1, 4)
    )
    assert one / four == pytest.approx(4.0, rel=0.4)


@pytest.mark.parametrize(("steps", "spacing", "falls"), [(4, "trailing", True), (50, "leading", False)])
def test_its_variance_against_draft_1(gaussian: GaussianModel, steps: int, spacing: str, falls: bool) -> None:
    """Over pictures, at n = 2: an update's variance falls where the last step is large, for more denoiser rows.

    Where it is small, the re-noised pictures are the picture itself: the variance stays, so at equal cost it is worse.
    """
    setup = lab(gaussian, guidance=1.0, steps=steps, spacing=spacing)
    pictures = [[request] for request in requests(gaussian, 100)]
    draft = setup.tuner("draft-k", batch_size=1, k=1)
    lv = setup.tuner("draft-lv", batch_size=1, n=2, reduction="mean")
    ratio = spread(lv, pictures) / spread(draft, pictures)
    rows = [tuner.planned_cost().expected.denoiser_rows for tuner in (lv, draft)]
    assert rows[0] - rows[1] == 2 * 2
    if falls:
        assert ratio < 0.9
    else:
        assert ratio * rows[0] / rows[1] > 1.0


@pytest.mark.parametrize("level", [130, (30, 300)])
def test_levels_are_where_they_are_asked_for(gaussian: GaussianModel, level: int | tuple[int, int]) -> None:
    """A range is drawn from anew in each loop, the same for a whole update, its ends included."""
    setup = lab(gaussian)
    low, high = (level, level) if isinstance(level, int) else level
    seen: set[int] = set()
    tuner = setup.tuner("draft-lv", batch_size=2, n=3, level=level, keep_base=False)
    for first in range(40):
        batch = requests(gaussian, first + 2)[first:]
        draws = setup.context.randomness.child("iteration", first)
        seen |= {low + draws.integer("level", i, below=high - low + 1) for i in range(3)}
        tuner.iterate(batch)
    assert min(seen) >= low
    assert max(seen) <= high
    assert len(seen) == 1 if isinstance(level, int) else max(seen) - min(seen) > 200


@pytest.mark.parametrize("reencode", [True, False])
def test_a_random_level_and_the_encoder_by_hand(tiny_model: StableDiffusion, reencode: bool) -> None:
    """The gradient of the terms at the levels drawn, from x_0 or from what the encoder makes of its picture."""
    setup = lab(tiny_model)
    batch = requests(tiny_model, 2)
    tuner = setup.tuner("draft-lv", batch_size=2, n=2, level=[30, 300], keep_base=False, reencode=reencode)
    copy = {name: p.detach().clone().requires_grad_() for name, p in tiny_model.adapter_parameters().items()}
    with torch.no_grad():
        clean = reference_chain(tiny_model, batch, setup.context.sampler, [Adapter()] * 4)
        if reencode:
            clean = tiny_model.encode(tiny_model.decode(clean))
    draws = setup.context.randomness.child("iteration", batch[0].noise_id)
    losses = []
    for i in range(2):
        t = 30 + draws.integer("level", i, below=271)
        alpha, sigma = tiny_model.alpha_sigma(t)
        shape, keyed = tiny_model.latent_shape, setup.context.randomness
        fresh = torch.stack([keyed.normal(shape, "renoise", r.prompt.id, r.noise_id, i) for r in batch]).double()
        x = alpha * clean + sigma * fresh
        noise = reference_noise(tiny_model, x, t, [r.prompt.text for r in batch], 4.0, Adapter(parameters=copy))
        losses.append(-mean_reward(setup, (x - sigma * noise) / alpha, batch))
    expected = torch.autograd.grad(torch.stack(losses).sum(), list(copy.values()))
    assert_close(gradients(tuner, batch), dict(zip(copy, expected, strict=True)))
    assert setup.meter.cost.decodes == tuner.planned_cost().maximal.decodes == (6 if reencode else 4)


@pytest.mark.parametrize("level", [1000, -1, [300, 30], [0, 1000]])
def test_levels_that_are_none_are_refused(gaussian: GaussianModel, level: object) -> None:
    """Named, with what to change."""
    with pytest.raises(UserError, match=r"draft-lv\.level"):
        lab(gaussian).tuner("draft-lv", level=level)
