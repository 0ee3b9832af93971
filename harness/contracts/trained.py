"""Contracts of methods that change weights."""

from __future__ import annotations

import copy
import io
import math
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from harness import store
from harness.api import Adapter, Conditioning, DiffusionModel, Generation, UserError
from harness.assembly import check_arms
from harness.cell import run_cell
from harness.contracts.lab import CPU, Subject, evaluate, lab, requests
from harness.contracts.outcome import Broken, Contract, hold
from harness.contracts.rewards import QuadraticReward, Watch
from harness.contracts.shared import Result, round_cost, run_config, same, work
from harness.grid import Grid
from harness.workshop import Workshop

# So large an epsilon makes AdamW's first steps proportional to the gradient: 1e-2 of it, nothing clipped.
PROPORTIONAL = {"learning_rate": 1e4, "epsilon": 1e6, "weight_decay": 0.0, "max_gradient_norm": None}
# How much of the way to the best reward a method must at least come, by what it sees of the reward.
SHARE_WITH_GRADIENT, SHARE_WITHOUT = 0.5, 0.2
BEST = 20.0  # reward there; the base's pictures score about half a point less


def trains_the_adapter_alone(subject: Subject) -> None:
    """Every parameter of the adapter moves, the base does not, and metrics are finite.

    There are two pictures of each of two prompts, so that normalised advantages are a little below 1 in size: cut to
    integers they are 0, and nothing moves.
    """
    setup = lab(subject.tiny)
    tuner = subject.tuner(setup)
    batch = requests(setup.inner, 2)
    base = Generation(setup.context.sampler, lora_scale=0.0)
    before, weights, pictures = setup.parameters(), setup.inner.fingerprint(), tuner.generate(batch, base)
    after = work(setup, tuner)
    still = [name for name in before if torch.equal(before[name], after[name])]
    hold(not still, f"{len(still)} of {len(before)} parameters of the adapter do not move, {(still or [''])[0]} first")
    hold(setup.inner.fingerprint() == weights, "the weights of the base model have changed")
    hold(torch.equal(tuner.generate(batch, base), pictures), "pictures with the adapter off have changed")


def reports_finite_metrics(subject: Subject) -> None:
    """`reward` and `gradient_norm` among them."""
    setup = lab(subject.gaussian)
    tuner = subject.tuner(setup)
    metrics = tuner.iterate(requests(setup.inner, tuner.requests_per_iteration))
    missing = sorted({"reward", "gradient_norm"} - metrics.keys())
    hold(not missing, f"no {' and no '.join(missing)}")
    hold(all(math.isfinite(value) for value in metrics.values()), f"not all finite: {dict(metrics)}")


def resumes_bit_for_bit(subject: Subject) -> None:
    """Restored from the adapter and the state on disk, the next updates are those of the uninterrupted run."""
    for model, iterations in ((subject.gaussian, 2), (subject.tiny, 1)):
        going_on = _resumed_is_the_same(subject, model, iterations)
        hold(going_on, f"restored after {iterations} iterations, a run goes on differently")


def _resumed_is_the_same(subject: Subject, model: DiffusionModel, iterations: int) -> bool:
    """As many iterations before as after."""
    setup = lab(model)
    tuner = subject.tuner(setup)
    for index in range(iterations):
        work(setup, tuner, index)
    adapter, state = setup.parameters(), _on_disk(tuner.state_dict())
    for index in range(iterations, 2 * iterations):
        uninterrupted = work(setup, tuner, index)

    again = lab(model)
    resumed = subject.tuner(again)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            parameter.copy_(adapter[name])
    resumed.load_state_dict(copy.deepcopy(state))
    for index in range(iterations, 2 * iterations):
        restored = work(again, resumed, index)
    return same(restored, uninterrupted)


def _on_disk(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise Broken(f"the state holds more than tensors and plain values: {reason}") from None
    return loaded


def ignores_the_micro_batch(subject: Subject) -> None:
    """All together, in uneven parts or one by one, also with a sampler with noise: only rounding differs."""
    for model, eta, sizes in ((subject.tiny, 0.0, (3,)), (subject.gaussian, 1.0, (3, 1))):
        whole = _update(subject, model, eta, micro_batch=64)
        size = max(float(change.abs().max()) for change in whole.values())
        for count in sizes:
            parts = _update(subject, model, eta, micro_batch=count)
            off = max(float((parts[name] - whole[name]).abs().max()) for name in whole)
            share = f"{off / max(size, 1e-300):.1e} of its size"
            hold(off <= 1e-9 * size, f"in parts of {count} the update differs by {share} (eta {eta:g})")


def _update(subject: Subject, model: DiffusionModel, eta: float, micro_batch: int) -> Result:
    setup = lab(model, micro_batch=micro_batch, eta=eta)
    tuner = subject.tuner(setup, optimizer=PROPORTIONAL)
    before = setup.parameters()
    return {name: after - before[name] for name, after in work(setup, tuner).items()}


def improves_the_reward(subject: Subject) -> None:
    """On a Gaussian and a concave reward, fresh pictures come a good part of the way to the best.

    Methods that see the score alone get more pictures and are asked for less. The scores are far from zero, so that
    the differences between them are all that can teach.
    """
    pathwise = subject.finetuner.needs_reward_gradient
    setup = lab(subject.gaussian, QuadraticReward(CPU, BEST), adapter=0.0, guidance=1.0, micro_batch=64)
    more = {} if pathwise or "rollout_size" not in subject.settings else {"rollout_size": 64}
    tuner = subject.tuner(setup, optimizer={"learning_rate": 2e-2}, **more)
    reward, fresh = QuadraticReward(CPU, BEST), requests(setup.inner, 256, seed=77)
    before = evaluate(setup, reward, fresh)
    iterations = 80 if pathwise else 40
    for index in range(iterations):
        work(setup, tuner, index)
    share = (evaluate(setup, reward, fresh) - before) / (BEST - before)
    needed = SHARE_WITH_GRADIENT if pathwise else SHARE_WITHOUT
    hold(share > needed, f"{share:.0%} of the way in {iterations} iterations; at least {needed:.0%} are asked for")


def leaves_no_holes(subject: Subject) -> None:
    """Wherever a gradient runs through the adapted denoiser, it can reach the adapter: nobody put in frozen values.

    The costs of such a step are those of any other, and the steps around it still teach.
    """
    setup = lab(subject.gaussian, checkpointing="off")
    original, holes = setup.inner.denoise, []

    def watched(x_BCHW: Tensor, t: int, condition: Conditioning, adapter: Adapter) -> Tensor:
        values = (adapter.parameters or setup.inner.adapter_parameters()).values()
        through = torch.is_grad_enabled() and x_BCHW.requires_grad and adapter.scale != 0
        if through and not any(value.requires_grad for value in values):
            holes.append(t)
        return original(x_BCHW, t, condition, adapter)

    with mock.patch.object(setup.inner, "denoise", watched):
        work(setup, subject.tuner(setup))
    steps = ", ".join(str(t) for t in sorted(set(holes), reverse=True))
    hold(not holes, f"at timestep {steps} a gradient runs through the denoiser past frozen values of the adapter")


def stays_within_its_budget(subject: Subject) -> None:
    """A cell with a budget of two and a half iterations runs, spends no more, and one that pays for none is refused."""
    planned = round_cost(subject.tuner(lab(subject.gaussian))).maximal
    for unit, amount in (("queries", planned.queries), ("denoiser_rows", planned.denoiser_rows)):
        if amount:
            _, status = _run(subject, Watch(QuadraticReward(CPU)), unit, 2.5 * amount)
            spent = status["cost"][unit]
            hold(status["iterations"] >= 2, f"{status['iterations']} iterations on a budget of two and a half")
            hold(spent <= 2.5 * amount, f"{spent:g} {unit} spent, {2.5 * amount:g} allowed")
    unit, amount = ("queries", planned.queries) if planned.queries else ("denoiser_rows", planned.denoiser_rows)
    try:
        check_arms(_grid(subject, unit, 0.5 * amount))
    except UserError:
        return
    hold(False, f"{0.5 * amount:g} {unit} pay for no iteration, and were accepted")


def never_sees_held_out_prompts(subject: Subject) -> None:
    """In a run of the benchmark, the training reward is asked about training prompts alone."""
    watch = Watch(QuadraticReward(CPU))
    grid, _ = _run(subject, watch, "iterations", 3)
    foreign = sorted(watch.prompts - {prompt.id for prompt in grid.training_prompts()})
    hold(not foreign, f"training asked the reward about {', '.join(foreign[:3])}")


def _run(subject: Subject, watch: Watch, unit: str, amount: float) -> tuple[Grid, dict[str, Any]]:
    """One cell of a run, trained and evaluated: the run's plan, and what the cell's status says."""
    grid = _grid(subject, unit, amount)
    workshop = Workshop(grid)
    workshop.training_rewards = dict.fromkeys(workshop.training_rewards, watch)
    cell = grid.cells[1]
    with tempfile.TemporaryDirectory() as folder:
        run_cell(workshop, cell, Path(folder), lambda phase, fraction, detail: None)
        return grid, store.read_json(Path(folder) / "cells" / cell.cell / "status.json")


def _grid(subject: Subject, unit: str, amount: float) -> Grid:
    return Grid(run_config(subject, budget={"unit": unit, "amount": amount, "curve_points": []}), subject.gaussian)


TRAINED = (
    Contract(
        "adapter-only",
        "every parameter of the adapter moves, and the base does not",
        "optimise model.adapter_parameters(); a parameter that stays had no gradient (a detached decoder or latent), "
        "or one of zero (advantages cut to integers)",
        trains_the_adapter_alone,
    ),
    Contract(
        "metrics",
        "an iteration reports finite metrics, reward and gradient_norm among them",
        "return {'reward': ..., 'gradient_norm': optimizer.step(), ...} from iterate",
        reports_finite_metrics,
    ),
    Contract(
        "improves",
        "on the Gaussian model the reward improves",
        "look for a flipped sign (the optimiser descends), weights that forget the reward, advantages without a "
        "baseline, or a step that is lost in clipping; where the method only learns slowly, give it larger batches "
        "with --set",
        improves_the_reward,
    ),
    Contract(
        "no-holes",
        "a gradient that runs through the adapted denoiser reaches the adapter",
        "pass Adapter() in every step of the window; outside it run without gradient, or with the denoiser's input "
        "detached (input_gradient=False); for the gradient of an input alone, use torch.autograd.grad",
        leaves_no_holes,
    ),
    Contract(
        "resumes",
        "saved and restored in the middle, it goes on as if it had not stopped, bit for bit",
        "put everything that the next iteration reads into state_dict (optimiser, statistics, buffers, counters), as "
        "tensors and plain values",
        resumes_bit_for_bit,
    ),
    Contract(
        "micro-batch",
        "results do not depend on how many pictures are in memory at once",
        "divide by the number of all requests, not of the part; key draws by prompt and noise id, never by row",
        ignores_the_micro_batch,
    ),
    Contract(
        "budget",
        "a budget is never exceeded",
        "let planned_cost().maximal be the most that an iteration can spend",
        stays_within_its_budget,
    ),
    Contract(
        "held-out",
        "prompts that are held out never reach training",
        "train on the requests that iterate is given",
        never_sees_held_out_prompts,
    ),
)
