"""Cells that train nothing: the base model, and methods that spend queries and rows on each picture they generate.

Such a cell has no checkpoint: an interrupted one starts again, and ends with the same records.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from harness import store
from harness.api import Cost, Diverged, Generation, Request
from harness.assembly import assemble
from harness.base_reference import curve_places
from harness.evaluation import Evaluated, Pictures
from harness.given import GivenPictures
from harness.grid import BASE_CELL, Cell
from harness.metering import Generate, Meter, MeteredModel, Tally
from harness.picture_metrics import appearance_rows, curve_rows
from harness.records import write_final, write_metrics, write_status
from harness.sampling import generate
from harness.watching import END, START
from harness.workshop import Progress, Workshop


def run_base(workshop: Workshop, cell: Cell, directory: Path, progress: Progress) -> str:
    """The base model's pictures."""
    meter = Meter()
    identity = {"cell": BASE_CELL, "arm": BASE_CELL, "method": BASE_CELL, "training_reward": "", "seed": -1}
    run = _Untrained(workshop, cell, directory, progress, "base", identity, Tally(meter), {})
    return run.finish(_base_generate(workshop, meter))


def run_inference(workshop: Workshop, cell: Cell, directory: Path, progress: Progress) -> str:
    """The pictures of a method that changes no weights.

    Where it meets a reward that is not a number the cell has diverged, and has the base model's pictures: the gain of a
    method that gave none is zero.
    """
    grid, meter = workshop.grid, Meter()
    arm = grid.arms[cell.arm]
    tuner = assemble(grid, arm, cell.reward, workshop.training_rewards, meter, cell.seed)
    identity = {
        "cell": cell.cell,
        "arm": cell.arm,
        "method": arm.method,
        "training_reward": cell.reward,
        "seed": cell.seed,
    }
    run = _Untrained(workshop, cell, directory, progress, arm.kind, identity, Tally(meter), Cost().counts())
    if isinstance(tuner, GivenPictures):
        evaluated = workshop.evaluator.final_requests()
        return run.write(evaluated, tuner.pictures(evaluated), None, [])
    try:
        return run.finish(tuner.generate)
    except Diverged as error:
        return run.finish(_base_generate(workshop, Meter()), "diverged", str(error))


def _base_generate(workshop: Workshop, meter: Meter) -> Generate:
    model = MeteredModel(workshop.model, meter)

    def pictures(requests: Sequence[Request], generation: Generation) -> Tensor:
        return generate(model, requests, replace(generation, lora_scale=0.0))

    return pictures


@dataclass
class _Untrained:
    """One attempt at a cell that is evaluated as it is."""

    workshop: Workshop
    cell: Cell
    directory: Path
    progress: Progress
    kind: str
    identity: dict[str, Any]
    tally: Tally
    cost: dict[str, float]
    started: str = field(default_factory=store.utc_now)
    clock: float = field(default_factory=time.perf_counter)

    def finish(self, pictures_of: Generate, state: str = "completed", reason: str = "") -> str:
        """Generate, score and write all records; returns the state."""
        evaluator = self.workshop.evaluator
        evaluated = evaluator.final_requests()
        generate_counted = self.tally.counted(pictures_of)

        def report(fraction: float) -> None:
            self.progress("evaluate", 0.8 * fraction, "base model" if self.kind == "base" else "pictures")

        pictures, latents = evaluator.pictures(generate_counted, [e.request for e in evaluated], report)
        # A diverged cell shows the base's pictures; what a picture of its own would have cost is not known.
        generation = self.tally.per_picture() if state == "completed" else {}
        diversity = evaluator.diversity(pictures_of)
        return self.write(evaluated, pictures, latents, diversity, generation, state, reason)

    def write(
        self,
        evaluated: Sequence[Evaluated],
        pictures: Pictures,
        latents: NDArray[np.float32] | None,
        diversity: Sequence[Mapping[str, Any]],
        generation: Mapping[str, float] | None = None,
        state: str = "completed",
        reason: str = "",
    ) -> str:
        """Score pictures and write all records; returns the state."""
        evaluator, directory = self.workshop.evaluator, self.directory
        store.write_json(directory / "identity.json", self.workshop.grid.identity(self.cell))
        keep = self.workshop.keep_images or latents is None
        write_final(evaluator, directory, self.identity, {}, evaluated, pictures, latents, keep_images=keep)
        curve = self._on_the_curve(pictures, latents) if latents is not None else []
        write_metrics(directory, self.identity, [*diversity, *appearance_rows(pictures, evaluated)], curve)
        seconds = {"train": 0.0, "evaluate": time.perf_counter() - self.clock}
        write_status(
            directory,
            self.cell,
            state,
            reason,
            self.started,
            seconds,
            0,
            self.cost,
            evaluator,
            self.kind,
            generation or {},
        )
        return state

    def _on_the_curve(self, pictures: Pictures, latents: NDArray[np.float32]) -> list[dict[str, Any]]:
        """Full rows of metrics on the pictures of the trained cells' curves, at their start or their end."""
        evaluator, base = self.workshop.evaluator, self.kind == "base"
        places = curve_places(evaluator)
        before = None if base else self.workshop.base_reference(self.directory.parent).latents
        rows = curve_rows(evaluator, pictures[places], latents[places], before)
        return [{**self.identity, "variant": "default", "point": START if base else END, **row} for row in rows]
