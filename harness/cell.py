"""Trains and evaluates one cell; whatever moment it is killed at, the next attempt ends with the same records."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harness import store
from harness.api import CostRange, Diverged, Generation, Prompt, Randomness, Request, TrainedFineTuner
from harness.assembly import assemble, iteration_cost, planned_cost
from harness.base_reference import curve_places
from harness.curve import CurveRecords, Warn
from harness.early_stopping import DIRECTORY, EarlyStopping
from harness.grid import BASE_CELL, Cell
from harness.metering import Meter, Tally
from harness.picture_metrics import appearance_rows
from harness.probe_points import END, MIDDLE, START, ProbePoints
from harness.records import (
    final_rows,
    peak_memory_mib,
    score_rows,
    write_final,
    write_metrics,
    write_status,
)
from harness.untrained import run_base, run_inference
from harness.variants import (
    EARLY_STOPPING,
    OWN_SAMPLER,
    adapter_path,
    bring_up_to_date,
    own_sampler_rows,
    save_parameters,
    set_parameters,
    settings_of,
    variant_rows,
)
from harness.watching import END as CURVE_END
from harness.workshop import Progress, Workshop

CHECKPOINT_SECONDS = 15.0


@dataclass
class Spent:
    """What a cell has used so far: seconds by phase, and iterations."""

    iterations: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0


def request_stream(prompts: Sequence[Prompt], shape: Sequence[int], seed: int, start: int = 0) -> Iterator[Request]:
    """The training requests of a seed, the same for every method: prompts in shuffled epochs, fresh noise each."""
    randomness = Randomness(seed, "training stream")
    n = start
    while True:
        epoch, place = divmod(n, len(prompts))
        order = randomness.permutation(len(prompts), "epoch", epoch)
        yield Request(prompts[order[place]], n, randomness.normal(shape, "x_T", n))
        n += 1


def run_cell(
    workshop: Workshop, cell: Cell, run_dir: Path, progress: Progress, warn: Warn = lambda warning: None
) -> str:
    """Bring one cell to its end.

    Args:
        workshop: Of this process.
        cell: The cell.
        run_dir: Of the run.
        progress: Told how far it is.
        warn: Told of over-optimisation as it is seen.

    Returns:
        `completed` or `diverged`.
    """
    directory = run_dir / "cells" / cell.cell
    directory.mkdir(parents=True, exist_ok=True)
    status = store.read_json(directory / "status.json")
    if status.get("state") in ("completed", "diverged") and status.get("training_hash") == cell.training_hash:
        bring_up_to_date(workshop, cell, directory, status)
        return str(status["state"])
    for name in ("status.json", "error.txt"):  # of an attempt that crashed
        (directory / name).unlink(missing_ok=True)
    if cell.cell == BASE_CELL:
        return run_base(workshop, cell, directory, progress)
    if workshop.grid.arms[cell.arm].inference:
        return run_inference(workshop, cell, directory, progress)
    return CellRun(workshop, cell, directory, progress, warn).run()


class CellRun:
    """One attempt at a trained cell."""

    def __init__(self, workshop: Workshop, cell: Cell, directory: Path, progress: Progress, warn: Warn) -> None:
        self.workshop, self.cell, self.directory, self.progress = workshop, cell, directory, progress
        grid = workshop.grid
        self.arm, self.config = grid.arms[cell.arm], grid.config
        self.meter, self.spent, self.started = Meter(), Spent(), store.utc_now()
        self.state, self.reason = "", ""  # how training ended, once it has
        self.generation: Mapping[str, float] = {}
        self.components = len(grid.training_rewards[cell.reward])
        tuner = assemble(grid, self.arm, cell.reward, workshop.training_rewards, self.meter, cell.seed)
        assert isinstance(tuner, TrainedFineTuner)
        self.tuner, self.tally = tuner, Tally(self.meter)
        self.points = sorted(p for p in self.config.budget.curve_points if p < self.config.budget.amount)
        self.curve = CurveRecords(workshop, directory, self._identity(), self.points, warn)
        self.probes = ProbePoints(workshop, cell, directory)
        self.variants: dict[str, dict[str, Any]] = {}
        self.early_stopping = (
            EarlyStopping(workshop.evaluator, self.config.early_stopping, grid.suite.split("validation"))
            if self.config.early_stopping
            else None
        )

    def run(self) -> str:
        """Train until the budget is spent, evaluating on the way, then evaluate the end."""
        self._resume()
        store.write_json(self.directory / "identity.json", self.workshop.grid.identity(self.cell))
        if not self.state:
            self.state, self.reason = self._train()
            self._save_checkpoint()
        self._evaluate_end()
        seconds = {"train": self.spent.train_seconds, "evaluate": self.spent.evaluate_seconds}
        write_status(
            self.directory,
            self.cell,
            self.state,
            self.reason,
            self.started,
            seconds,
            self.spent.iterations,
            self.meter.cost.counts(),
            self.workshop.evaluator,
            "training",
            self.generation,
            self.variants,
            self.early_stopping.kept if self.early_stopping else None,
        )
        (self.directory / "checkpoint.pt").unlink(missing_ok=True)
        self.curve.remove()
        shutil.rmtree(self.directory / "probes", ignore_errors=True)
        return self.state

    # ---------------------------------------------------------------- training

    def _train(self) -> tuple[str, str]:
        """Iterate while the budget lasts.

        Returns:
            The state that training ended in, and why. A diverged adapter is the one before the failing iteration.
        """
        tuner = self.tuner
        planned = planned_cost(tuner, self.workshop.model)
        size = tuner.requests_per_iteration
        prompts = self.workshop.grid.training_prompts()
        shape = self.workshop.model.latent_shape
        stream = request_stream(prompts, shape, self.cell.seed, start=self.spent.iterations * size)
        saved = time.perf_counter()
        if not self.spent.iterations:
            self.probes.take(START, self._identity())
        self._evaluate_point_if_due()
        while self._affordable(planned):
            requests = [next(stream) for _ in range(size)]
            clock, before = time.perf_counter(), self._adapter_state()
            try:
                metrics = tuner.iterate(requests)
            except Diverged as error:
                set_parameters(self.workshop.model, before)
                return "diverged", f"{error} (iteration {self.spent.iterations + 1})"
            seconds = time.perf_counter() - clock
            self.spent.iterations += 1
            self.spent.train_seconds += seconds
            self._log(metrics, seconds)
            self._report("train", f"reward {metrics.get('reward', float('nan')):.3g}")
            self._evaluate_point_if_due()
            if self._used() >= self.config.budget.amount / 2:
                self.probes.take(MIDDLE, self._identity())
            if time.perf_counter() - saved > CHECKPOINT_SECONDS:
                self._save_checkpoint()
                saved = time.perf_counter()
        return "completed", ""

    def _used(self) -> float:
        used = {
            "queries": self.meter.cost.queries,
            "denoiser_rows": self.meter.cost.denoiser_rows,
            "iterations": self.spent.iterations,
            "seconds": self.spent.train_seconds,
        }
        return float(used[self.config.budget.unit])

    def _affordable(self, planned: CostRange) -> bool:
        next_one = iteration_cost(planned.maximal, self.components, self.config.budget.unit)
        if self.config.budget.unit == "seconds":
            next_one = self.spent.train_seconds / max(1, self.spent.iterations)
        return self._used() + next_one <= self.config.budget.amount + 1e-9

    def _log(self, metrics: Mapping[str, float], seconds: float) -> None:
        cost = self.meter.cost
        line = {"iteration": self.spent.iterations, **metrics, "seconds": seconds, "memory_mib": peak_memory_mib()}
        store.append_line(self.directory / "updates.jsonl", {**line, **asdict(cost)})

    def _report(self, phase: str, detail: str, share: float = 0.0) -> None:
        # Evaluation's share of a cell's time is not known beforehand; a fifth is close for the presets.
        done = 0.8 * min(1.0, self._used() / self.config.budget.amount) if phase == "train" else 0.8 + 0.2 * share
        self.progress(phase, done, detail)

    # -------------------------------------------------------------- checkpoints

    def _adapter_state(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.workshop.model.adapter_parameters().items()}

    def _save_checkpoint(self) -> None:
        buffer = io.BytesIO()
        content = {
            "training_hash": self.cell.training_hash,
            "adapter": self._adapter_state(),
            "tuner": self.tuner.state_dict(),
            "cost": asdict(self.meter.cost),
            "spent": asdict(self.spent),
            "started": self.started,
            "ended": [self.state, self.reason],
            "early_stopping": self.early_stopping.state_dict() if self.early_stopping else {},
        }
        torch.save(content, buffer)
        store.write_bytes(self.directory / "checkpoint.pt", buffer.getvalue())

    def _resume(self) -> None:
        path = self.directory / "checkpoint.pt"
        if path.exists():
            content = torch.load(path, map_location=self.workshop.model.device, weights_only=True)
            if content["training_hash"] == self.cell.training_hash:
                set_parameters(self.workshop.model, content["adapter"])
                self.tuner.load_state_dict(content["tuner"])
                self.meter.add(**content["cost"])
                self.spent = Spent(**content["spent"])
                self.started = content["started"]
                self.state, self.reason = content["ended"]
                if self.early_stopping:
                    self.early_stopping.load_state_dict(content["early_stopping"])
        store.cut_back(self.directory / "updates.jsonl", self.spent.iterations)

    # --------------------------------------------------------------- evaluation

    def _identity(self) -> dict[str, Any]:
        return {
            "cell": self.cell.cell,
            "arm": self.cell.arm,
            "method": self.arm.method,
            "training_reward": self.cell.reward,
            "seed": self.cell.seed,
        }

    def _position(self) -> dict[str, Any]:
        return {
            "iteration": self.spent.iterations,
            "queries": self.meter.cost.queries,
            "denoiser_rows": self.meter.cost.denoiser_rows,
            "train_seconds": self.spent.train_seconds,
        }

    def _generate(self, requests: Sequence[Request], generation: Generation) -> torch.Tensor:
        """The method's own generation of pictures; what evaluation takes is no part of what training spends."""
        spent = self.meter.cost
        latents = self.tally.counted(self.tuner.generate)(requests, generation)
        self.meter.cost = spent
        return latents

    def _evaluate_point_if_due(self) -> None:
        """Evaluate at the first iteration that reaches a point of the grid; once, also across interruptions."""
        due = [p for p in self.points if p <= self._used() + 1e-9]
        if not due or self.curve.has(point := f"{due[-1]:g}"):
            return
        clock = time.perf_counter()
        evaluator = self.workshop.evaluator
        evaluated = evaluator.curve_requests()
        pictures, latents = evaluator.pictures(self._generate, [e.request for e in evaluated])
        rows = score_rows(self._identity(), self._position(), point, evaluator.score(pictures, evaluated))
        self.curve.measure(point, pictures, latents)
        self.curve.watch(point, rows)
        self._consider_stopping(point)
        self.spent.evaluate_seconds += time.perf_counter() - clock
        # In this order: a point that is there is in the checkpoint, too, with what early stopping made of it.
        self._save_checkpoint()
        self.curve.complete(point, rows)

    def _evaluate_end(self) -> None:
        clock = time.perf_counter()
        evaluator = self.workshop.evaluator
        evaluated = evaluator.final_requests()

        def report(fraction: float) -> None:
            self._report("evaluate", "final pictures", 0.8 * fraction)

        self.tally = Tally(self.meter)
        pictures, latents = evaluator.pictures(self._generate, [e.request for e in evaluated], report)
        self.generation = self.tally.per_picture()
        position = self._position()
        keep = self.workshop.keep_images
        self.workshop.model.save_adapter(self.directory / "adapter")
        save_parameters(adapter_path(self.directory), self._adapter_state())
        metrics = [*evaluator.diversity(self._generate), *appearance_rows(pictures, evaluated)]
        shared = curve_places(evaluator)
        self.curve.measure(CURVE_END, pictures[shared], latents[shared])
        self.probes.take(END, self._identity())
        self.probes.collect()
        rows = self._variant_rows()
        write_final(
            evaluator, self.directory, self._identity(), position, evaluated, pictures, latents, rows, keep_images=keep
        )
        write_metrics(self.directory, self._identity(), metrics, self.curve.metric_rows())
        self.curve.watch(CURVE_END, final_rows(self.directory))
        self.spent.evaluate_seconds += time.perf_counter() - clock
        self._report("evaluate", "done", 1.0)

    def _consider_stopping(self, point: str) -> None:
        if self.early_stopping:
            state = self._adapter_state()
            self.early_stopping.consider(self._generate, state, self._identity(), self._position(), point)

    def _variant_rows(self) -> list[dict[str, Any]]:
        """Scores with the sampler trained with and of the run's variants; early stopping, another adapter, is last."""
        evaluator, model, rows = self.workshop.evaluator, self.workshop.model, []
        sampler = self.tuner.training_sampler or self.arm.sampler
        if sampler != evaluator.generation.sampler:
            self.variants[OWN_SAMPLER] = sampler.model_dump()
            rows += own_sampler_rows(evaluator, self._generate, sampler, self._identity(), self._position())
        for variant in self.config.variants:
            self.variants[variant.label] = settings_of(variant)
            rows += variant_rows(
                evaluator, model, variant.label, settings_of(variant), self._identity(), self._position()
            )
        if self.early_stopping:
            self._consider_stopping("final")
            best = self.early_stopping.best
            save_parameters(adapter_path(self.directory, EARLY_STOPPING), best["adapter"])
            set_parameters(model, best["adapter"])
            model.save_adapter(self.directory / DIRECTORY)
            self.variants[EARLY_STOPPING] = {}
            rows += variant_rows(evaluator, model, EARLY_STOPPING, {}, self._identity(), best["position"])
            rows += self.early_stopping.rows
        return rows
