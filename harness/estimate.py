"""What a run will cost, from its plan and a few timed rows: the answer to --dry-run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.api import Adapter, Cost, CostRange, Randomness
from harness.assembly import Declared, assemble, iteration_cost, planned_cost
from harness.benchmark import Job
from harness.grid import Arm, Grid
from harness.metering import Meter

ROWS = 16


@dataclass(frozen=True)
class Estimate:
    """What one cell will take.

    Attributes:
        planned: Of one iteration, or of one picture where nothing is trained.
        iterations: That the budget pays for.
        training: Of all of them.
        pictures: Generated for the evaluation.
        evaluation: What these cost.
    """

    planned: Cost
    iterations: int
    training: Cost
    pictures: int
    evaluation: Cost


def describe_cost(job: Job) -> str:
    """The grid, and denoiser rows, queries, disk and minutes that its missing cells will take."""
    grid, config = job.grid, job.grid.config
    grid.model.add_adapter(config.adapter, Randomness(0, "initial adapter"))
    forward, backward, decode = _timed_rows(grid)
    lines = [
        f"{job.run_dir}: {len(grid.cells)} cells, {len(job.pending)} to run on {job.workers} worker(s)",
        (
            f"model {grid.model_name}, suite {grid.suite.name}, {len(config.seeds)} seed(s), "
            f"budget {config.budget.amount:g} {config.budget.unit} a cell"
        ),
        "",
        f"{'arm':<16}{'reward':<26}{'iterations':>11}{'queries':>9}{'denoiser rows':>15}{'seconds':>9}",
    ]
    untrained: list[str] = []
    total = Cost()
    work = 0.0
    for expression in grid.training_rewards:
        for label, arm in grid.arms.items():
            found = _estimate(grid, arm, expression)
            cost = found.training + found.evaluation
            seconds = (
                (cost.forward_rows + cost.recomputed_rows) * forward
                + (cost.gradient_rows + cost.backward_rows) / 2 * backward
                + cost.decodes * decode
            )
            count = sum(1 for c in job.pending if (c.arm, c.reward) == (label, expression))
            total, work = total + cost * count, work + seconds * count
            name = f"{label:<16}{expression:<26}"
            spent = f"{found.training.queries:>9.0f}{found.training.denoiser_rows:>15.0f}"
            lines.append(f"{name}{found.iterations:>11}{spent}{seconds:>9.0f}")
            if arm.inference:
                each, every = found.planned, found.evaluation
                line = f"{each.queries:>9.0f}{each.denoiser_rows:>15.0f}{found.pictures:>10}"
                untrained.append(f"{name}{line}{every.queries:>9.0f}{every.denoiser_rows:>15.0f}")
    if untrained:
        lines += [
            "",
            "No weights changed, queries and rows spent on each picture instead:",
            f"{'':<42}{'a picture':>24}{'evaluation':>34}",
            f"{'arm':<16}{'reward':<26}{'queries':>9}{'denoiser rows':>15}{'pictures':>10}{'queries':>9}{'rows':>15}",
            *untrained,
        ]
    kilobytes = (_final_pictures(grid) * 12 + 300) * len(job.pending)
    lines += [
        "",
        f"in all: {total.denoiser_rows:.0f} denoiser rows (evaluation included), {total.queries:.0f} queries,",
        f"about {kilobytes / 1024:.0f} MiB of disk, about {work / job.workers / 60:.1f} minutes",
        "Rows count forward, recomputed and backward passes; seconds are those of one cell, evaluation included.",
    ]
    return "\n".join(lines)


def _final_pictures(grid: Grid) -> int:
    return sum(len(prompts) for prompts in grid.evaluated.values()) * grid.config.evaluation.latents


def _estimate(grid: Grid, arm: Arm, expression: str) -> Estimate:
    """Of one cell of an arm on a reward."""
    config, evaluation = grid.config, grid.config.evaluation
    judged = list(grid.evaluated.values())[-1]
    pictures = _final_pictures(grid)
    pictures += len(judged[: evaluation.diversity_prompts]) * evaluation.diversity_latents
    planned = _planned(grid, arm, expression)
    if arm.inference:
        return Estimate(planned.expected, 0, Cost(), pictures, (planned.expected + Cost(decodes=1)) * pictures)
    points = sum(1 for p in config.budget.curve_points if p < config.budget.amount)
    pictures += len(judged) * min(evaluation.curve_latents, evaluation.latents) * points
    each = iteration_cost(planned.maximal, 1, config.budget.unit)
    iterations = int(config.budget.amount // each) if each else 0
    rows = grid.model.rows_per_latent(config.sampler.guidance) * config.sampler.steps
    generated = Cost(forward_rows=rows, decodes=1) * pictures
    return Estimate(planned.expected, iterations, planned.expected * iterations, pictures, generated)


def _planned(grid: Grid, arm: Arm, expression: str) -> CostRange:
    """Cost of one iteration, or of one picture, with a query for every component of the reward."""
    terms = grid.training_rewards[expression]
    rewards = {name: Declared(grid.rewards[name].reward) for _, name in terms}
    planned = planned_cost(assemble(grid, arm, expression, rewards, Meter(), seed=0), grid.model)
    expected, maximal = (replace(c, queries=c.queries * len(terms)) for c in (planned.expected, planned.maximal))
    return CostRange(expected, maximal)


def _timed_rows(grid: Grid) -> tuple[float, float, float]:
    """Seconds of a forward row, of a row forward and backward, and of a decoded picture, on one thread."""
    model, threads = grid.model, torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.zeros(ROWS, *model.latent_shape, device=model.device, dtype=model.dtype)
    condition = model.condition([""] * ROWS)

    def denoised() -> Tensor:
        return model.predict(x, 500, condition, guidance=1.0, adapter=Adapter()).conditional

    def forward() -> None:
        with torch.no_grad():
            denoised()

    def both() -> None:
        denoised().float().square().sum().backward()

    def decode() -> None:
        with torch.no_grad():
            model.decode(x)

    once, through, decoded = _seconds(forward) / ROWS, _seconds(both) / ROWS, _seconds(decode) / ROWS
    torch.set_num_threads(threads)
    if model.checkpoint_inside:
        through -= once  # recomputed rows are in the plan, apart
    return once, through, decoded


def _seconds(call: Callable[[], None], repeats: int = 3) -> float:
    call()
    clock = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - clock) / repeats
