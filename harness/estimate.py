"""What a run will cost, from its plan and a few timed rows: the answer to --dry-run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from harness.api import Adapter, Cost, Randomness
from harness.assembly import assemble, iteration_cost
from harness.benchmark import Job
from harness.grid import BASE_CELL, Arm, Grid
from harness.metering import Meter

ROWS = 16


def describe_cost(job: Job) -> str:
    """The grid, and denoiser rows, queries, disk and minutes that its missing cells will take."""
    grid, config = job.grid, job.grid.config
    grid.model.add_adapter(config.adapter, Randomness(0, "initial adapter"))
    forward, backward, decode = _timed_rows(grid)
    rows = 1 if config.sampler.guidance == 1.0 else 2
    final = sum(len(prompts) for prompts in grid.evaluated.values()) * config.evaluation.latents
    curve = len(list(grid.evaluated.values())[-1]) * min(config.evaluation.curve_latents, config.evaluation.latents)
    diversity = config.evaluation.diversity_prompts * config.evaluation.diversity_latents
    lines = [
        f"{job.run_dir}: {len(grid.cells)} cells, {len(job.pending)} to run on {job.workers} worker(s)",
        (
            f"model {grid.model_name}, suite {grid.suite.name}, {len(config.seeds)} seed(s), "
            f"budget {config.budget.amount:g} {config.budget.unit} a cell"
        ),
        "",
        f"{'arm':<16}{'reward':<26}{'iterations':>11}{'queries':>9}{'denoiser rows':>15}{'seconds':>9}",
    ]
    total = Cost()
    seconds_of: dict[tuple[str, str], float] = {}
    for expression in grid.training_rewards:
        for label, arm in grid.arms.items():
            iterations, cost = _training_cost(grid, arm, expression)
            points = sum(1 for p in config.budget.curve_points if p < config.budget.amount)
            pictures = final + curve * points + diversity
            evaluation = Cost(forward_rows=pictures * rows * config.sampler.steps, decodes=pictures)
            seconds = (
                (cost.forward_rows + cost.recomputed_rows + evaluation.forward_rows) * forward
                + (cost.gradient_rows + cost.backward_rows) / 2 * backward
                + (cost.decodes + evaluation.decodes) * decode
            )
            seconds_of[label, expression] = seconds
            count = sum(1 for c in job.pending if (c.arm, c.reward) == (label, expression))
            total = total + (cost + evaluation) * count
            lines.append(
                f"{label:<16}{expression:<26}{iterations:>11}{cost.queries:>9.0f}{cost.denoiser_rows:>15.0f}{seconds:>9.0f}"
            )
    work = sum(seconds_of[c.arm, c.reward] for c in job.pending if c.cell != BASE_CELL)
    kilobytes = (final * 12 + 300) * len(job.pending)
    lines += [
        "",
        f"in all: {total.denoiser_rows:.0f} denoiser rows (evaluation included), {total.queries:.0f} training queries,",
        f"about {kilobytes / 1024:.0f} MiB of disk, about {work / job.workers / 60:.1f} minutes",
        "Rows count forward, recomputed and backward passes; seconds are those of one cell, evaluation included.",
    ]
    return "\n".join(lines)


def _training_cost(grid: Grid, arm: Arm, expression: str) -> tuple[int, Cost]:
    """Iterations that the budget pays for, and what they are expected to cost."""
    budget, terms = grid.config.budget, grid.training_rewards[expression]
    rewards = {name: grid.rewards[name](grid.model.device) for _, name in terms}
    planned = assemble(grid, arm, expression, rewards, Meter(), seed=0).planned_cost()
    each = iteration_cost(planned.maximal, len(terms), budget.unit)
    iterations = int(budget.amount // each) if each else 0
    return iterations, replace(planned.expected, queries=planned.expected.queries * len(terms)) * iterations


def _timed_rows(grid: Grid) -> tuple[float, float, float]:
    """Seconds of a forward row, of a row forward and backward, and of a decoded picture, on one thread."""
    model, threads = grid.model, torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.zeros(ROWS, *model.latent_shape, device=model.device, dtype=model.dtype)
    condition = model.condition([""] * ROWS)

    def forward() -> None:
        with torch.no_grad():
            model.denoise(x, 500, condition, Adapter())

    def both() -> None:
        model.denoise(x, 500, condition, Adapter()).float().square().sum().backward()

    def decode() -> None:
        with torch.no_grad():
            model.decode(x)

    result = _seconds(forward) / ROWS, _seconds(both) / ROWS, _seconds(decode) / ROWS
    torch.set_num_threads(threads)
    return result


def _seconds(call: Callable[[], None], repeats: int = 3) -> float:
    call()
    clock = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - clock) / repeats
