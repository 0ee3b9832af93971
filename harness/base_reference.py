"""The base model on the pictures that curves are about: read from its cell, or made again with the same bits.

Cells need it before the base model's own cell may have ended. Nothing of it is charged to a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from harness import store
from harness.api import Generation, Request
from harness.evaluation import Evaluator
from harness.grid import BASE_CELL
from harness.picture_metrics import curve_rows
from harness.records import score_rows
from harness.sampling import generate
from harness.watching import START

IDENTITY: Mapping[str, Any] = {
    "cell": BASE_CELL,
    "arm": BASE_CELL,
    "method": BASE_CELL,
    "training_reward": "",
    "seed": -1,
}


@dataclass(frozen=True, eq=False)
class BaseReference:
    """The base model at the curve's requests.

    Attributes:
        latents: (N, C, H, W), in their order.
        scores: As rows of scores.parquet, these pictures at least.
        metrics: Likewise of metrics.parquet, at point `0`.
    """

    latents: NDArray[np.float32]
    scores: pd.DataFrame
    metrics: pd.DataFrame


def base_reference(evaluator: Evaluator, cells: Path) -> BaseReference:
    """Read it where the base model's cell has ended and has all of it, else make it.

    Args:
        evaluator: Of the run.
        cells: Directory of the run's cells.
    """
    directory = cells / BASE_CELL
    status = store.read_json(directory / "status.json")
    scored = status.get("evaluation_rewards", {})
    if status.get("state") == "completed" and evaluator.versions.items() <= scored.items():
        metrics = pd.read_parquet(directory / "metrics.parquet")
        latents = np.load(directory / "latents.npz")["latents"][curve_places(evaluator)]
        scores = pd.read_parquet(directory / "scores.parquet")
        # An older version recorded nothing at point 0: as for the report, that is then not known.
        return BaseReference(latents, scores, metrics[metrics["point"] == START])
    return _made(evaluator)


def curve_places(evaluator: Evaluator) -> list[int]:
    """Where the curve's requests are among the final ones."""
    final = {(e.split, e.request.prompt.id, e.request.noise_id): i for i, e in enumerate(evaluator.final_requests())}
    return [final[e.split, e.request.prompt.id, e.request.noise_id] for e in evaluator.curve_requests()]


def _made(evaluator: Evaluator) -> BaseReference:
    """Generate, in the batches of the base model's cell: numbers depend on the batch by rounding."""

    def base(requests: Sequence[Request], generation: Generation) -> Tensor:
        return generate(evaluator.model, requests, replace(generation, lora_scale=0.0))

    final, size, places = evaluator.final_requests(), evaluator.config.batch, curve_places(evaluator)
    found: dict[int, tuple[Any, Any]] = {}
    scores = []
    for start in sorted({place - place % size for place in places}):
        part = final[start : start + size]
        pictures, latents = evaluator.pictures(base, [e.request for e in part])
        scores += evaluator.score(pictures, part)
        found |= {start + k: (pictures[k], latents[k]) for k in range(len(part))}
    shown, latent = (np.stack([found[place][k] for place in places]) for k in (0, 1))
    rows = [
        {**IDENTITY, "variant": "default", "point": START, **row} for row in curve_rows(evaluator, shown, latent, None)
    ]
    return BaseReference(latent, pd.DataFrame(score_rows(IDENTITY, {}, "final", scores)), pd.DataFrame(rows))
