"""What a cell records along its curve besides scores: metrics, pictures, and warnings of over-optimisation.

The points of the curve, the base model and the end of training share their (prompt, latent) pairs. In metrics.parquet
the base model's values on these pairs stand at point `0` and those of a cell's end at `end`; `final` is on all
pictures.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness import store
from harness.evaluation import Pictures, save_pictures
from harness.picture_metrics import curve_rows
from harness.watching import END, sum_of_terms, watch_cell
from harness.workshop import Workshop

PROMPTS_SHOWN = 12  # along training: the first evaluated held-out prompts, with their first latent

Warn = Callable[[Mapping[str, Any]], None]


class CurveRecords:
    """The curve of one cell.

    Args:
        workshop: With the evaluator.
        directory: Of the cell's records.
        identity: The cell's.
        points: The grid, in the budget's unit.
        warn: Told of the first over-optimisation that each witness shows; again where a point is evaluated again.
    """

    def __init__(
        self, workshop: Workshop, directory: Path, identity: Mapping[str, Any], points: Sequence[float], warn: Warn
    ) -> None:
        self._workshop, self._directory, self._identity = workshop, directory, identity
        self._looks, self._warn = len(points) + 1, warn

    def has(self, point: str) -> bool:
        """Whether a point is complete."""
        return self._scores(point).exists()

    def measure(self, point: str, pictures: Pictures, latents: NDArray[np.float32]) -> None:
        """Store a point's metrics and, along training, some of its pictures.

        Args:
            point: Of the grid, or `END`.
            pictures: (N, H, W, 3) of the evaluator's curve requests.
            latents: (N, C, H, W), likewise.
        """
        evaluator = self._workshop.evaluator
        if self._workshop.keep_images and point != END:
            evaluated = evaluator.curve_requests()
            shown = [i for i, item in enumerate(evaluated) if item.request.noise_id == 0][:PROMPTS_SHOWN]
            save_pictures(self._directory, pictures[shown], [evaluated[i] for i in shown], point)
        base = self._workshop.base_reference(self._directory.parent).latents
        rows = [
            {**self._identity, "variant": "default", "point": point, **row}
            for row in curve_rows(evaluator, pictures, latents, base)
        ]
        store.write_parquet(self._metrics(point), rows, store.METRIC_COLUMNS)

    def watch(self, point: str, rows: Sequence[Mapping[Any, Any]]) -> None:
        """Warn of what a measured point shows; a fault of the watch is a warning, too, and costs no trained cell.

        Args:
            point: Of the grid, or `END`.
            rows: Its scores.
        """
        try:
            self._watch(point, rows)
        except Exception as error:  # whatever it is: the records are complete without it, and reports watch them again
            detail = f"the over-optimisation watch failed at point {point}: {type(error).__name__}: {error}"
            self._warn({"detail": detail, "point": point, "witness": ""})

    def _watch(self, point: str, rows: Sequence[Mapping[Any, Any]]) -> None:
        grid, base = self._workshop.grid, self._workshop.base_reference(self._directory.parent)
        split = list(self._workshop.evaluator.splits)[-1]
        tables = [pd.DataFrame([dict(row) for row in rows], columns=list(store.SCORE_COLUMNS)).assign(point=point)]
        paths = (self._directory / "points").glob("*.parquet")
        tables += [pd.read_parquet(path) for path in paths if path.stem != point]
        scores = pd.concat(tables)
        reward = str(self._identity["training_reward"])
        seen = watch_cell(
            scores[scores["split"] == split],
            pd.DataFrame(self.metric_rows(), columns=list(store.METRIC_COLUMNS)),
            base.scores[base.scores["split"] == split],
            base.metrics,
            training_reward=reward,
            terms=sum_of_terms(grid.training_rewards[reward]),
            roles={name: source.reward.role for name, source in grid.rewards.items()},
            latents=grid.config.evaluation.curve_latents,
            looks=self._looks,
        )
        for warned in seen.first_warnings:
            if warned.point == point:
                self._warn({"detail": warned.sentence, **warned.numbers})

    def complete(self, point: str, rows: Sequence[Mapping[Any, Any]]) -> None:
        """Store a point's scores, which say that it is complete."""
        store.write_parquet(self._scores(point), rows, store.SCORE_COLUMNS)

    def metric_rows(self) -> list[dict[Any, Any]]:
        """Rows of metrics.parquet of all points that were measured, in the order of training."""
        paths = sorted((self._directory / "points" / "metrics").glob("*.parquet"), key=_place)
        return [row for path in paths for row in pd.read_parquet(path).to_dict("records")]

    def remove(self) -> None:
        """Delete what is in the cell's tables by now."""
        shutil.rmtree(self._directory / "points", ignore_errors=True)

    def _scores(self, point: str) -> Path:
        return self._directory / "points" / f"{point}.parquet"

    def _metrics(self, point: str) -> Path:
        return self._directory / "points" / "metrics" / f"{point}.parquet"


def _place(path: Path) -> float:
    return float("inf") if path.stem == END else float(path.stem)
