"""Contracts of methods that change no weights and spend while they generate."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.api import Generation
from harness.contracts.lab import CPU, Lab, Subject, evaluate, lab, requests
from harness.contracts.outcome import Contract, hold
from harness.contracts.rewards import QuadraticReward
from harness.contracts.shared import PICTURES

# Pictures over which a method must not score worse than the base sampler. The gain of one that leaves rewards alone
# in the mean is below twice its standard error, which is what is allowed.
COMPARED = 128


def changes_no_weights(subject: Subject) -> None:
    """Adapter, base and gradients are as they were."""
    setup = lab(subject.tiny)
    tuner = subject.tuner(setup)
    before, weights = setup.parameters(), setup.inner.fingerprint()
    tuner.generate(requests(setup.inner, PICTURES), Generation(setup.context.sampler))
    parameters = setup.inner.adapter_parameters()
    hold(all(torch.equal(parameters[name], value) for name, value in before.items()), "the adapter has changed")
    hold(setup.inner.fingerprint() == weights, "the weights of the base model have changed")
    left = [name for name, parameter in parameters.items() if parameter.grad is not None]
    hold(not left, f"gradients are left behind on {len(left)} parameters of the adapter")


def gives_latents(subject: Subject) -> None:
    """One finite latent a request, in the model's shape and dtype, without a graph, with autograd on and off."""
    setup = lab(subject.tiny)
    tuner = subject.tuner(setup)
    batch = requests(setup.inner, 3)
    made = []
    for grad in (True, False):  # evaluation generates without autograd
        with torch.set_grad_enabled(grad):
            made.append(tuner.generate(batch, Generation(setup.context.sampler)))
    expected = (3, *setup.inner.latent_shape)
    hold(tuple(made[0].shape) == expected, f"latents of shape {tuple(made[0].shape)}, {expected} are asked for")
    hold(made[0].dtype == setup.inner.dtype, f"latents are {made[0].dtype}, the model's are {setup.inner.dtype}")
    hold(bool(made[0].isfinite().all()), "some latents are not finite")
    hold(not made[0].requires_grad, "the latents keep a graph")
    hold(torch.equal(made[0], made[1]), "under torch.no_grad other pictures are made")


def ignores_the_batch(subject: Subject) -> None:
    """A picture is the same alone, among others in any order, and whatever is in memory at once, also with noise."""
    for model, eta in ((subject.tiny, 0.0), (subject.gaussian, 1.0)):
        whole = _latents(subject, lab(model, micro_batch=64, eta=eta))
        size = float(whole.abs().max())
        setup = lab(model, micro_batch=64, eta=eta)
        batch = requests(setup.inner, PICTURES)
        tuner = subject.tuner(setup)
        sampler = Generation(setup.context.sampler)
        others = {
            "one by one": torch.cat([tuner.generate([request], sampler) for request in batch]),
            "in the opposite order": tuner.generate(batch[::-1], sampler).flip(0),
            "with one in memory at once": _latents(subject, lab(model, micro_batch=1, eta=eta)),
            "with three in memory at once": _latents(subject, lab(model, micro_batch=3, eta=eta)),
        }
        for how, latents in others.items():
            off = float((latents - whole).abs().max()) / size
            hold(off <= 1e-9, f"{how} latents differ by {off:.1e} of their size (eta {eta:g})")


def _latents(subject: Subject, setup: Lab) -> Tensor:
    generation = Generation(setup.context.sampler)
    latents: Tensor = subject.tuner(setup).generate(requests(setup.inner, PICTURES), generation)
    return latents


def does_not_lower_the_reward(subject: Subject) -> None:
    """On a Gaussian and a concave reward, its pictures score at least as well as the base sampler's on the mean."""
    setup = lab(subject.gaussian, adapter=0.0, guidance=1.0, micro_batch=64)
    reward, batch = QuadraticReward(CPU), requests(setup.inner, COMPARED, seed=77)
    latents = subject.tuner(setup).generate(batch, Generation(setup.context.sampler))
    scores = reward(setup.inner.decode(latents), [r.prompt for r in batch])
    base = evaluate(setup, reward, batch)
    mean, error = float(scores.mean()), float(scores.std()) / COMPARED**0.5
    hold(mean >= base - 2 * error - 1e-12, f"mean reward {mean:.3g}, the base sampler's is {base:.3g}")


INFERENCE = (
    Contract(
        "weights-unchanged",
        "no weight changes while it generates",
        "differentiate with torch.autograd.grad with respect to latents, not with backward(); set no parameter",
        changes_no_weights,
    ),
    Contract(
        "latents",
        "it gives one finite latent a request, with autograd on or off",
        "turn autograd on yourself (torch.enable_grad) where a gradient is needed, and detach what is returned",
        gives_latents,
    ),
    Contract(
        "batch",
        "a picture does not depend on the batch that it is in",
        "key draws by prompt and noise id, never by row; sum losses over rows, and normalise each row by itself",
        ignores_the_batch,
    ),
    Contract(
        "improves",
        "on the Gaussian model the reward is not lowered",
        "look for a flipped sign, or a step so long that it overshoots",
        does_not_lower_the_reward,
    ),
)
