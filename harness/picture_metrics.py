"""Metrics of evaluated pictures that no reward sees, as rows of metrics.parquet: one for each prompt and metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.evaluation import Evaluated, Evaluator, Pictures, from_8_bit
from harness.metrics.appearance import appearance
from harness.metrics.diversity import pairwise_distance, vendi_score
from harness.metrics.drift import root_mean_square

Array = NDArray[np.float64]


def appearance_rows(pictures: Pictures, evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """How pictures look, the mean over each prompt's latents.

    Args:
        pictures: (N, H, W, 3).
        evaluated: What each is of.
    """
    return [row for name, values in appearance(pictures).items() for row in _means(name, values, evaluated)]


def curve_rows(
    evaluator: Evaluator, pictures: Pictures, latents: NDArray[np.float32], base: NDArray[np.float32] | None
) -> list[dict[str, Any]]:
    """All that is recorded of the pictures of a point of the curve; without drift for the base model itself.

    Diversity is between a prompt's latents, where there are two or more: nothing is generated for it.

    Args:
        evaluator: Whose curve requests the pictures are of.
        pictures: (N, H, W, 3).
        latents: (N, C, H, W).
        base: The base model's latents of the same requests.
    """
    evaluated = evaluator.curve_requests()
    rows = diversity_rows(evaluator, pictures, evaluated)
    if base is not None:
        rows += _means("drift_latent_rms", root_mean_square(latents, base), evaluated)
    return rows + appearance_rows(pictures, evaluated)


@torch.no_grad()
def diversity_rows(evaluator: Evaluator, pictures: Pictures, evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Vendi score and mean pairwise distance within each prompt that has two pictures or more."""
    places = _by_prompt(evaluated)
    if all(len(place) < 2 for place in places.values()):
        return []
    size = evaluator.config.batch
    parts = [
        evaluator.embedding(from_8_bit(pictures[start : start + size], evaluator.model.device)).double().cpu().numpy()
        for start in range(0, len(pictures), size)
    ]
    vectors = np.concatenate(parts)
    return [
        {"metric": metric, "prompt_id": prompt, "value": value(vectors[place]), "n": len(place)}
        for prompt, place in places.items()
        if len(place) > 1
        for metric, value in (("vendi", vendi_score), ("pairwise_distance", pairwise_distance))
    ]


def _means(name: str, values: Array, evaluated: Sequence[Evaluated]) -> list[dict[str, Any]]:
    return [
        {"metric": name, "prompt_id": prompt, "value": float(values[place].mean()), "n": len(place)}
        for prompt, place in _by_prompt(evaluated).items()
    ]


def _by_prompt(evaluated: Sequence[Evaluated]) -> dict[str, list[int]]:
    """Places of each prompt's pictures, prompts in the order of the evaluation."""
    places: dict[str, list[int]] = {}
    for place, item in enumerate(evaluated):
        places.setdefault(item.request.prompt.id, []).append(place)
    return places
