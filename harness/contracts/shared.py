"""Contracts of every method, in terms of a *round* of its work: an iteration, or a handful of pictures generated."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from harness.api import CostRange, Diverged, FineTuner, Generation, Randomness, TrainedFineTuner, UserError
from harness.config import RunConfig, resolve
from harness.contracts import rewards
from harness.contracts.lab import CPU, Lab, Subject, lab, requests
from harness.contracts.outcome import Contract, NotApplicable, hold
from harness.contracts.rewards import BrightnessReward, BrokenReward, QuadraticReward, Watch
from harness.cost import Cost
from harness.grid import Grid

PICTURES = 4  # of a round of a method that only generates
DRAWN_ROUNDS = 60  # over which the expected cost of a method that draws lengths is compared with its mean

Result = dict[str, Tensor]


def round_size(tuner: FineTuner) -> int:
    """Requests of a round."""
    return tuner.requests_per_iteration if isinstance(tuner, TrainedFineTuner) else PICTURES


def round_cost(tuner: FineTuner) -> CostRange:
    """Planned cost of a round."""
    planned = tuner.planned_cost()
    pictures = 1 if isinstance(tuner, TrainedFineTuner) else PICTURES
    return CostRange(planned.expected * pictures, planned.maximal * pictures)


def work(setup: Lab, tuner: Any, index: int = 0, seed: int = 0) -> Result:
    """The index-th round of a seed's stream. Returns what came of it: the adapter's parameters, or the latents."""
    size = round_size(tuner)
    batch = requests(setup.inner, size, seed, first=index * size)
    if isinstance(tuner, TrainedFineTuner):
        tuner.iterate(batch)
        return setup.parameters()
    return {"latents": tuner.generate(batch, Generation(setup.context.sampler))}


def same(one: Result, other: Result) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------- costs


def costs_what_it_plans(subject: Subject) -> None:
    """With and without guidance and checkpointing, in uneven parts; on a UNet, too, where recomputing ends early."""
    for checkpointing in ("off", "on"):
        for guidance in (1.0, 4.0):
            _compare_cost(subject, lab(subject.gaussian, guidance=guidance, checkpointing=checkpointing, micro_batch=3))
    _compare_cost(subject, lab(subject.tiny, checkpointing="on"), rounds=1)


def _compare_cost(subject: Subject, setup: Lab, rounds: int = 3) -> None:
    tuner = subject.tuner(setup)
    planned = round_cost(tuner)
    guidance = setup.context.sampler.guidance
    where = f"on {setup.inner.name.split('/')[-1]}, guidance {guidance:g}"
    for index in range(rounds):
        before = setup.meter.cost
        work(setup, tuner, index)
        spent = setup.meter.cost - before
        over = _differences(spent, planned.maximal, lambda count, plan: count > plan + 1e-9)
        hold(not over, f"{where}: {over} (at most planned)")
        if planned.expected == planned.maximal:
            unequal = _differences(spent, planned.expected, lambda count, plan: abs(count - plan) > 1e-9)
            hold(not unequal, f"{where}: {unequal}")


def _differences(spent: Cost, planned: Cost, differ: Callable[[float, float], bool]) -> str:
    plan = asdict(planned)
    pairs = [(kind, count, plan[kind]) for kind, count in asdict(spent).items() if differ(count, plan[kind])]
    return ", ".join(f"{kind} {count:g}, planned {planned_count:g}" for kind, count, planned_count in pairs)


def expects_the_mean_cost(subject: Subject) -> None:
    """Over many rounds the rows come within a tenth of the expected ones, where a length is drawn."""
    setup = lab(subject.gaussian, guidance=1.0)
    tuner = subject.tuner(setup)
    planned = round_cost(tuner)
    if planned.expected == planned.maximal:
        raise NotApplicable("nothing that it spends is drawn")
    for index in range(DRAWN_ROUNDS):
        work(setup, tuner, index)
    mean, expected = setup.meter.cost.denoiser_rows / DRAWN_ROUNDS, planned.expected.denoiser_rows
    hold(abs(mean / expected - 1) < 0.1, f"{mean:.1f} denoiser rows on average, {expected:.1f} expected")


# ------------------------------------------------------------------------------------------------------------ rewards


def uses_the_gradient_as_declared(subject: Subject) -> None:
    """The meter sees reward gradients exactly where they are declared; without them any reward will do."""
    declared = subject.finetuner.needs_reward_gradient
    setup = lab(subject.gaussian)
    work(setup, subject.tuner(setup))
    used = setup.meter.cost.reward_gradients
    says = f"needs_reward_gradient is {declared}, and the reward was differentiated for {used:g} pictures"
    hold((used > 0) == declared, says)
    if not declared:
        blind = lab(subject.gaussian, BrightnessReward)
        tuner = subject.tuner(blind)
        before = blind.parameters()
        after = work(blind, tuner)
        hold(not same(after, before), "a reward without a gradient teaches it nothing")


def shows_the_reward_whole_pictures(subject: Subject) -> None:
    """A good part of the Gaussian's pixels lies outside [0, 1]: a reward that never sees one sees clamped pictures."""
    bright = BrokenReward(CPU)
    bright.offset = 0.0  # the mean pixel: whoever follows its gradient leaves [0, 1]
    watch = Watch(bright)
    setup = lab(subject.gaussian, watch, adapter=0.0, guidance=1.0, steps=20)  # few steps narrow what is drawn
    tuner = subject.tuner(setup)
    index = 0
    while watch.pixels < 300 and index < 100:
        work(setup, tuner, index)
        index += 1
    seen = f"all {watch.pixels} pixels that the reward saw lie in [{watch.smallest:.3g}, {watch.largest:.3g}]"
    hold(watch.smallest < 0 or watch.largest > 1, f"{seen}; some that the decoder made lie outside [0, 1]")


def asks_about_its_own_prompts(subject: Subject) -> None:
    """The reward is asked about the prompts of the requests and no others."""
    watch = Watch(QuadraticReward(CPU))
    setup = lab(subject.gaussian, watch)
    tuner = subject.tuner(setup)
    given = {request.prompt.id for request in requests(setup.inner, round_size(tuner))}
    work(setup, tuner)
    foreign = sorted(watch.prompts - given)
    hold(not foreign, f"it asked the reward about {', '.join(foreign)}, which no request named")


def diverges_on_a_broken_reward(subject: Subject) -> None:
    """A reward that is not a number, or infinite, ends in Diverged in the same round."""
    for offset in (float("nan"), float("inf")):
        broken = BrokenReward(CPU)
        broken.offset = offset
        watch = Watch(broken)
        setup = lab(subject.gaussian, watch)
        tuner = subject.tuner(setup)
        watch.patience = 16 + 3 * round_cost(tuner).maximal.queries
        try:
            work(setup, tuner)
        except Diverged:
            continue
        hold(False, f"a reward of {offset} went unnoticed")


def refuses_a_reward_without_gradient(subject: Subject) -> None:
    """A run with a non-differentiable reward is refused while it is planned: nothing is generated or scored."""
    if not subject.finetuner.needs_reward_gradient:
        raise NotApplicable("it needs no gradient of the reward")
    try:
        Grid(run_config(subject, "BrightnessReward"), subject.gaussian)
    except UserError:
        return
    hold(False, "a run with a reward that has no gradient was not refused")


def run_config(subject: Subject, reward: str = "QuadraticReward", **changes: Any) -> RunConfig:
    """A run of seconds of this method on the Gaussian."""
    evaluation = {"prompts": {"training": 1, "held-out": 2}, "latents": 1, "curve_latents": 1, "diversity_prompts": 0}
    return resolve(
        {
            "model": "gaussian",
            "preset": "smoke",
            "arms": [{"label": "checked", "method": subject.name, "overrides": subject.settings}],
            "rewards": [f"{Path(rewards.__file__)}:{reward}"],
            "seeds": [0],
            "device": "cpu",
            "dtype": "float64",
            "timing": False,
            "keep_images": "none",
            "evaluation": evaluation,
            **changes,
        }
    )


# --------------------------------------------------------------------------------------------------------- randomness


def repeats_itself(subject: Subject) -> None:
    """The same seed gives the same result bit for bit."""
    hold(same(_of_seed(subject, 0), _of_seed(subject, 0)), "two runs with the same seed differ")


def _of_seed(subject: Subject, seed: int) -> Result:
    setup = lab(subject.gaussian, seed=seed)
    tuner = subject.tuner(setup)
    work(setup, tuner, 0, seed)
    return work(setup, tuner, 1, seed)


def seeds_matter(subject: Subject) -> None:
    """Another seed (requests, initial adapter, own draws) gives another result."""
    hold(not same(_of_seed(subject, 0), _of_seed(subject, 1)), "two seeds give the same result")


def is_stochastic_as_declared(subject: Subject) -> None:
    """With the same requests and initial adapter, its own randomness matters exactly where it is declared."""
    found = []
    for seed in range(8):
        setup = lab(subject.gaussian)
        setup.context.randomness = Randomness(seed, "method")
        found.append(work(setup, subject.tuner(setup)))
    differs = any(not same(other, found[0]) for other in found[1:])
    declared = subject.finetuner.stochastic
    hold(differs == declared, f"stochastic is {declared}, and results {'differ' if differs else 'are the same'}")


def leaves_global_randomness_alone(subject: Subject) -> None:
    """Works with the global generators poisoned, and leaves their states as they were."""
    setup = lab(subject.tiny, checkpointing="on")
    before = _global_states()
    with _poisoned():
        tuner = subject.tuner(setup)
        work(setup, tuner)
        tuner.generate(requests(setup.inner, 2), Generation(setup.context.sampler))
    changed = [name for name, state in _global_states().items() if state != before[name]]
    hold(not changed, f"the global random state of {', '.join(changed)} has changed")


def _global_states() -> dict[str, str]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the global one
    words = [part.tolist() if hasattr(part, "tolist") else part for part in numpy_state]
    torch_state = torch.get_rng_state().numpy().tobytes().hex()
    return {"torch": torch_state, "numpy": repr(words), "random": repr(random.getstate())}


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Draws from a global generator raise."""
    with contextlib.ExitStack() as stack:

        def poison(owner: Any, label: str, names: str, allow_generator: bool) -> None:
            for name in names.split():
                refusing = _refusing(f"{label}.{name}", getattr(owner, name), allow_generator)
                stack.enter_context(mock.patch.object(owner, name, refusing))

        poison(torch, "torch", "randn rand randint randperm normal bernoulli multinomial", True)
        poison(torch.Tensor, "Tensor", "normal_ uniform_ random_ bernoulli_ exponential_ multinomial", True)
        poison(torch, "torch", "randn_like rand_like randint_like manual_seed seed", False)
        poison(np.random, "numpy.random", "rand randn randint random normal uniform choice shuffle permutation", False)
        poison(random, "random", "random randint randrange choice choices shuffle gauss uniform sample seed", False)
        yield


def _refusing(name: str, original: Callable[..., Any], allow_generator: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        hold(allow_generator and kwargs.get("generator") is not None, f"{name} draws from a global generator")
        return original(*args, **kwargs)

    return call


# ----------------------------------------------------------------------------------------------------------- settings


def checks_its_settings(subject: Subject) -> None:
    """Unknown names are refused, values are frozen, and every setting says what it is."""
    config = subject.finetuner.Config
    try:
        config.model_validate({"no_such_setting": 1})
    except ValidationError:
        pass
    else:
        hold(False, "a setting that does not exist is accepted")
    hold(config.model_config.get("frozen") is True, "settings can be changed after they were checked")
    silent = [name for name, field in config.model_fields.items() if name != "optimizer" and not field.description]
    hold(not silent, f"no description: {', '.join(silent)}")


COMMON = (
    Contract(
        "settings",
        "unknown settings are refused, and every setting is described",
        "let Config subclass MethodConfig or InferenceConfig as it is; each Field has a description with its source",
        checks_its_settings,
    ),
    Contract(
        "costs",
        "the meter counts what planned_cost says",
        "count rows twice with guidance; check which steps keep a graph (a stop-gradient too few, or a hole in the "
        "window), and whether every row with gradient is reached by the backward pass",
        costs_what_it_plans,
    ),
    Contract(
        "expected-cost",
        "what planned_cost expects is the mean of what is spent",
        "let `expected` be the mean over the lengths that the method draws, `maximal` their greatest",
        expects_the_mean_cost,
    ),
    Contract(
        "gradient-declared",
        "the reward's gradient is used if and only if needs_reward_gradient says so",
        "set the class attribute to what the method does; where it should flow, look for no_grad or detach between "
        "the reward and the denoiser, the decoder included",
        uses_the_gradient_as_declared,
    ),
    Contract(
        "refuses-blind-reward",
        "a reward without a gradient is refused before anything is spent",
        "set needs_reward_gradient = True on the class",
        refuses_a_reward_without_gradient,
    ),
    Contract(
        "unclamped",
        "the reward sees the decoder's pictures, not clamped ones",
        "pass model.decode(latents) to the reward as it is: a clamp has no gradient outside [0, 1]",
        shows_the_reward_whole_pictures,
    ),
    Contract(
        "own-prompts",
        "the reward is asked about the requests' prompts only",
        "score pictures with [r.prompt for r in requests]; load no prompts yourself",
        asks_about_its_own_prompts,
    ),
    Contract(
        "diverges",
        "a reward that is not a number ends in Diverged, not in a hang",
        "raise Diverged where the mean reward is not finite, before anything is averaged, sorted or retried",
        diverges_on_a_broken_reward,
    ),
    Contract(
        "global-random",
        "global random generators are neither used nor changed",
        "draw from context.randomness, keyed by the ids of requests; pass generator= where torch needs one",
        leaves_global_randomness_alone,
    ),
    Contract(
        "same-seed",
        "the same seed gives the same result, bit for bit",
        "derive every draw from context.randomness; keep no state on the class or the module",
        repeats_itself,
    ),
    Contract(
        "other-seed",
        "another seed gives another result",
        "start from the requests' own noise",
        seeds_matter,
    ),
    Contract(
        "stochastic",
        "its own randomness matters if and only if `stochastic` says so",
        "set the class attribute to what the method does",
        is_stochastic_as_declared,
    ),
)
