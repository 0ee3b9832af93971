"""Every method on flow models: it works, at the cost that it plans, or says why it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from harness.api import BASE, Adapter, DiffusionModel, UserError
from harness.contracts.lab import Subject
from harness.contracts.shared import round_cost, same, work
from harness.registry import discover, load_method
from harness.sampling import initial_latents, sample, schedule, step_noise, transition
from methods._guidance import Scene, rms
from methods._likelihood import Lesson, Picture
from methods._reward_gradient import Batch
from models.flux import Flux
from tests.fakes import CPU, QuadraticReward, assert_close, gradients, lab, requests
from tests.flow_gaussian import FlowGaussian
from tests.models.tiny_pipelines import save_flux

METHODS = sorted(discover("methods"))
# What makes a method fit that does not fit as it is, and how its refusal reads.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {"guidance": ({"begin": 0.3}, "pure noise")}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flux]:
    """A transformer of random weights in double precision, guidance embedded, with few tokens of text."""
    directory = save_flux(tmp_path_factory.mktemp("flux") / "pipeline", guidance_embeds=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.flux.T5_LENGTH", 8)
        yield Flux(str(directory), CPU, torch.float64)


def subject(method: str) -> Subject:
    """With small settings."""
    overrides = REFUSED.get(method, ({}, ""))[0]
    return Subject(method, load_method(method), FlowGaussian(), FlowGaussian(), overrides)


def assert_works(method: str, model: DiffusionModel, guidance: float) -> None:
    """One round changes something, costs what it plans, and all stays finite."""
    checked = subject(method)
    setup = lab(model, guidance=guidance, micro_batch=3)
    tuner = checked.tuner(setup)
    planned, before = round_cost(tuner), setup.parameters()
    after = work(setup, tuner)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not same(after, before)
    spent = setup.meter.cost
    for kind, count in spent.counts().items():
        assert count <= planned.maximal.counts()[kind] + 1e-9, kind
    if planned.expected == planned.maximal:
        assert spent == planned.expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("embedded", [False, True], ids=["two rows", "one row"])
def test_every_method_works(method: str, embedded: bool) -> None:
    """Without guidance and with it, which takes a second row or is told."""
    for guidance in (1.0, 3.0):
        assert_works(method, FlowGaussian(embedded_guidance=embedded), guidance)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_on_a_transformer(method: str, flux: Flux) -> None:
    """The same on FLUX."""
    assert_works(method, flux, 3.0)


@pytest.mark.parametrize("method", REFUSED)
def test_what_does_not_fit_is_refused(method: str) -> None:
    """Before anything is spent, with the reason and the remedy; on models with discrete timesteps it fits."""
    setting, why = REFUSED[method]
    setup = lab(FlowGaussian())
    with pytest.raises(UserError, match=f"{why}.*set {method}.{next(iter(setting))}"):
        setup.tuner(method)
    assert setup.meter.cost.denoiser_rows == 0


@pytest.mark.parametrize("timesteps", ["sampler", "all"])
def test_likelihood_draws_real_timesteps(timesteps: str) -> None:
    """Those of sampling, or any real number up to 1000, each lesson its own."""
    setup = lab(FlowGaussian())
    tuner = setup.tuner("raft", timesteps=timesteps)
    batch = requests(setup.inner, 40)
    lessons = [Lesson((Picture(r, r.noise),), 1.0) for r in batch]
    drawn = [tuner.timestep(lesson, setup.context.randomness) for lesson in lessons]
    visited = {step.t for step in schedule(setup.inner, setup.context.sampler)}
    if timesteps == "sampler":
        assert set(drawn) == visited
    else:
        assert not visited & set(drawn)
        assert len(set(drawn)) == 40
        assert 0 < min(drawn) < 100 < 900 < max(drawn) <= 1000


@pytest.mark.parametrize(
    ("level", "fits"), [(None, True), ((30, 300), True), (1000, True), ((0, 9), False), (1001, False)]
)
def test_levels_of_lv(level: Any, fits: bool) -> None:
    """From 1, the cleanest that is not clean, to pure noise."""
    setup = lab(FlowGaussian(), guidance=1.0)
    if fits:
        setup.tuner("draft-lv", level=level).iterate(requests(setup.inner, 4))
    else:
        with pytest.raises(UserError, match="1 <= first <= last <= 1000"):
            setup.tuner("draft-lv", level=level)


def test_pretraining_loss_of_refl_by_hand() -> None:
    """At a real timestep, the error of the noise that the velocity stands for."""
    setup = lab(FlowGaussian(), guidance=1.0)
    tuner = setup.tuner("refl", batch_size=2, m=1, pretraining=1.0)
    batch = requests(setup.inner, 2)
    draws = setup.context.randomness.child("iteration", 0)
    texts = [r.prompt.text for r in batch]
    condition = setup.inner.condition(texts)
    with torch.no_grad():
        x_0 = sample(setup.inner, initial_latents(setup.inner, batch), condition, setup.context.sampler, adapter=BASE)
    s = 1 - draws.integer("pretraining timestep", below=2**53) / 2**53
    noise = torch.stack([draws.normal((3, 1, 1), "pretraining", r.prompt.id, r.noise_id) for r in batch]).double()
    x_t = (1 - s) * x_0 + s * noise
    velocity = setup.inner.denoise(x_t, 1000 * s, condition, Adapter())
    error = ((x_t + (1 - s) * velocity - noise) ** 2).flatten(1).mean(1)
    found = tuner.denoising_loss(Batch(batch, initial_latents(setup.inner, batch), condition), draws)
    torch.testing.assert_close(found, error)


def test_measured_guidance_without_an_unconditional_branch() -> None:
    """Where guidance is told, what a step is measured against is the noise itself, not a difference of zero."""
    model = FlowGaussian(embedded_guidance=True)
    setup = lab(model, guidance=3.0)
    tuner = setup.tuner("mpgd")
    batch = requests(model, 2)
    scene = Scene(batch, model.condition([r.prompt.text for r in batch]), 3.0)
    step = schedule(model, setup.context.sampler)[1]
    prediction = tuner.predict(scene, step, initial_latents(model, batch))
    moved = tuner.measured(scene, step, prediction, torch.ones(2, 3, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(rms(moved), rms(prediction.noise))
    assert rms(moved).min() > 0


def test_adjoint_matching_at_the_base_is_the_pathwise_gradient() -> None:
    """Through the noisy chain from alpha 0: lambda times the gradient of -r, by its mean over the noisy steps."""
    model = FlowGaussian()
    setup = lab(model, adapter=0.0, guidance=1.0)
    tuner = setup.tuner("adjoint-matching", batch_size=3, reward_multiplier=30.0, stored_steps=None, clip_quantile=None)
    batch = requests(model, 3)
    condition = model.condition([r.prompt.text for r in batch])
    noise = step_noise(model, batch, setup.context.randomness, "trajectory")
    x = initial_latents(model, batch)
    for step in tuner.steps:
        adapter = Adapter() if step.std > 0 else BASE
        velocity = model.denoise(x, step.t, condition, adapter)
        s, s_next = step.t / 1000, step.sigma_next
        variance = (s_next / s) ** 2 * (s**2 - ((1 - s) / (1 - s_next) * s_next) ** 2)
        assert step.std**2 == pytest.approx(variance, abs=1e-15)
        kept = max(0.0, s_next**2 - variance) ** 0.5
        x = (1 - s_next) * (x - s * velocity) + kept * (x + (1 - s) * velocity)
        x = x + step.std * noise(step) if step.std > 0 else x
    parameters = model.adapter_parameters()
    reward = QuadraticReward(CPU)(x, []).mean()
    expected = dict(zip(parameters, torch.autograd.grad(-30.0 / 3 * reward, list(parameters.values())), strict=True))
    assert_close(gradients(tuner, batch), expected)


def test_freedom_moves_the_next_latent() -> None:
    """The step from the shifted clean latent is the plain step moved by the measured length, small alphas included."""
    model = FlowGaussian()
    setup = lab(model, guidance=3.0)
    tuner = setup.tuner("freedom", begin=0.0, end=1.0)
    batch = requests(model, 2)
    scene = Scene(batch, model.condition([r.prompt.text for r in batch]), 3.0)
    x = initial_latents(model, batch)
    for step in schedule(model, setup.context.sampler)[1:]:
        plain, gradient = tuner.gradient_at(scene, step, x)
        length = 0.2 * tuner.measured(scene, step, plain, gradient)
        moved = transition(tuner.guided(scene, step, x), step).mean - transition(plain, step).mean
        torch.testing.assert_close(moved, length, rtol=1e-9, atol=1e-12)
        assert length.abs().max() > 0
