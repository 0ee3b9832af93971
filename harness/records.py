"""Writes the records of a cell (results/README.md has their schema)."""

from __future__ import annotations

import io
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from harness import store
from harness.evaluation import Evaluated, Evaluator, Pictures, Score, load_pictures, save_pictures, to_8_bit
from harness.grid import Cell

POSITION = ("iteration", "queries", "denoiser_rows", "train_seconds")


def score_rows(
    identity: Mapping[str, Any],
    position: Mapping[str, Any],
    point: str,
    scores: Sequence[Score],
    variant: str = "default",
) -> list[dict[str, Any]]:
    """Rows of scores.parquet."""
    start = {"iteration": 0, "queries": 0.0, "denoiser_rows": 0.0, "train_seconds": 0.0, **position}
    return [
        {
            **identity,
            **start,
            "variant": variant,
            "point": point,
            "split": score.split,
            "prompt_id": score.prompt.id,
            "prompt": score.prompt.text,
            "noise_id": score.noise_id,
            "reward": score.reward,
            "score": score.score,
        }
        for score in scores
    ]


def write_final(
    evaluator: Evaluator,
    directory: Path,
    identity: Mapping[str, Any],
    position: Mapping[str, Any],
    evaluated: Sequence[Evaluated],
    pictures: Pictures,
    latents: NDArray[np.float32] | None,
    other_variants: Sequence[Mapping[str, Any]] = (),
    *,
    keep_images: bool,
) -> None:
    """Store the final pictures and latents, and all scores of the cell: its curve points, the end, other variants.

    Given pictures have no latents.
    """
    if keep_images:
        save_pictures(directory, pictures, evaluated)
    if latents is not None:
        buffer = io.BytesIO()
        np.savez(buffer, latents=latents)
        store.write_bytes(directory / "latents.npz", buffer.getvalue())
    rows: list[Any] = []
    for path in sorted((directory / "points").glob("*.parquet"), key=lambda p: float(p.stem)):
        rows += pd.read_parquet(path).to_dict("records")
    rows += score_rows(identity, position, "final", evaluator.score(pictures, evaluated))
    store.write_parquet(directory / "scores.parquet", [*rows, *other_variants], store.SCORE_COLUMNS)


def final_rows(directory: Path) -> list[dict[Any, Any]]:
    """A cell's scores at its end, by its whole adapter with the run's sampler."""
    scores = pd.read_parquet(directory / "scores.parquet")
    return scores[(scores["point"] == "final") & (scores["variant"] == "default")].to_dict("records")


def write_metrics(
    directory: Path, identity: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[Any, Any]]
) -> None:
    """Write metrics.parquet: rows of the end, and full rows of points of the curve."""
    full = [{**identity, "variant": "default", "point": "final", **row} for row in rows]
    store.write_parquet(directory / "metrics.parquet", [*curve, *full], store.METRIC_COLUMNS)


def write_status(
    directory: Path,
    cell: Cell,
    state: str,
    reason: str,
    started: str,
    seconds: Mapping[str, float],
    iterations: int,
    cost: Mapping[str, float],
    evaluator: Evaluator,
    kind: str,
    generation_cost: Mapping[str, float],
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> None:
    """Write status.json, which says that the cell has ended; the last file of a cell."""
    store.write_json(
        directory / "status.json",
        {
            "kind": kind,
            "state": state,
            "reason": reason,
            "iterations": iterations,
            "seconds": dict(seconds),
            "peak_memory_mib": peak_memory_mib(),
            "cost": dict(cost),
            "generation_cost": dict(generation_cost),
            "training_hash": cell.training_hash,
            "evaluation_hash": cell.evaluation_hash,
            "evaluation_rewards": evaluator.versions,
            "variants": {label: dict(settings) for label, settings in (variants or {}).items()},
            **({"kept": dict(kept)} if kept else {}),
            "started": started,
            "finished": store.utc_now(),
        },
    )


def scores_of_missing_rewards(
    evaluator: Evaluator,
    directory: Path,
    identity: Mapping[str, Any],
    position: Mapping[str, Any],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Rows of rewards that were added since a cell ended, from its stored pictures; nothing is generated again."""
    evaluated = evaluator.final_requests()
    scores = evaluator.score(_stored_pictures(evaluator, directory, evaluated), evaluated, names)
    return score_rows(identity, position, "final", scores)


@torch.no_grad()
def _stored_pictures(evaluator: Evaluator, directory: Path, evaluated: Sequence[Evaluated]) -> Any:
    """The final pictures of a finished cell; decoded again from its latents where the files were not kept."""
    if (directory / "images" / "final").is_dir():
        return load_pictures(directory, evaluated)
    model, batch = evaluator.model, evaluator.config.batch
    latents = torch.from_numpy(np.load(directory / "latents.npz")["latents"]).to(model.device, model.dtype)
    return np.concatenate([to_8_bit(model.decode(part)) for part in latents.split(batch)])


def peak_memory_mib() -> float:
    """Peak allocated on the accelerator where there is one, else peak resident of this process (Linux: KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
