"""Probes at the start, middle and end of a cell's training; what they cost is no part of what training spends."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from harness import store
from harness.api import Context, Randomness
from harness.context import CellContext
from harness.grid import Arm, Cell
from harness.metering import Meter, TrainingReward
from harness.probes import NORMS, VARIANCE, gradient_norms, gradient_variance, independent_requests
from harness.workshop import Workshop

START, MIDDLE, END = "start", "middle", "end"
PICTURES = 8  # whose gradient norms are taken, one at a time
ITERATIONS = 16  # over which the variance of a gradient is estimated


class ProbePoints:
    """The probes of one cell.

    Args:
        workshop: With the model that is being trained.
        cell: The cell.
        directory: Of the cell's records.
    """

    def __init__(self, workshop: Workshop, cell: Cell, directory: Path) -> None:
        self._workshop, self._cell, self._directory = workshop, cell, directory
        self._config = workshop.grid.config

    def take(self, point: str, identity: Mapping[str, Any]) -> None:
        """Measure and store a point, unless it is there already."""
        path = self._path(point)
        if not self._config.probes or path.exists():
            return
        rows = [{**identity, "point": point, **row} for row in self._measure()]
        store.write_parquet(path, rows, store.PROBE_COLUMNS)

    def collect(self) -> None:
        """Write probes.parquet from the points that were taken."""
        paths = [path for path in map(self._path, (START, MIDDLE, END)) if path.exists()]
        rows: list[Any] = [row for path in paths for row in pd.read_parquet(path).to_dict("records")]
        if rows:
            store.write_parquet(self._directory / "probes.parquet", rows, store.PROBE_COLUMNS)

    def _path(self, point: str) -> Path:
        return self._directory / "probes" / f"{point}.parquet"

    def _measure(self) -> list[dict[str, Any]]:
        grid, model, seed = self._workshop.grid, self._workshop.model, self._cell.seed
        arm, rows = grid.arms[self._cell.arm], []
        prompts = grid.training_prompts()
        if NORMS in self._config.probes:
            stream = independent_requests(prompts, model.latent_shape, Randomness(seed, "gradient norms"))
            pictures = list(islice(stream, PICTURES))
            rows += gradient_norms(model, self._reward(Meter()), pictures, arm.sampler)
        if VARIANCE in self._config.probes:
            stream = independent_requests(prompts, model.latent_shape, Randomness(seed, "gradient variance"))
            arms = list(grid.arms.values())
            rows += gradient_variance(arms, model, self._reward, self._context, stream, ITERATIONS)
        return rows

    def _reward(self, meter: Meter) -> TrainingReward:
        terms = self._workshop.grid.training_rewards[self._cell.reward]
        rewards = self._workshop.training_rewards
        return TrainingReward([(weight, rewards[name]) for weight, name in terms], meter, self._cell.reward)

    def _context(self, arm: Arm) -> Context:
        config, model = self._config, self._workshop.model
        randomness = Randomness(self._cell.seed, "probe")
        limit = config.activation_limit_gib
        return CellContext(model, randomness, arm.sampler, config.micro_batch, arm.checkpointing, limit)
