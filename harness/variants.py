"""Variants of a trained cell: other ways to generate with the adapter that it ended with, or kept on the way.

A variant costs pictures, not training: one that is asked for later is made from the stored adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save

from harness import store
from harness.api import DiffusionModel, Generation, Randomness, SamplerConfig
from harness.config import VariantConfig
from harness.evaluation import Evaluator
from harness.grid import Cell, Grid
from harness.metering import Generate
from harness.records import POSITION, score_rows, scores_of_missing_rewards
from harness.sampling import generate
from harness.workshop import Workshop

EARLY_STOPPING = "early-stopping"
OWN_SAMPLER, OWN_SAMPLER_BASE = "own-sampler", "own-sampler-base"


def variant_rows(
    evaluator: Evaluator,
    model: DiffusionModel,
    label: str,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
    position: Mapping[str, Any],
    names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Scores of one variant on the held-out prompts, all latents; by the rewards in `names`, or by all.

    Args:
        evaluator: Of the run.
        model: With the adapter that generates.
        label: Of the variant, in the records.
        settings: `lora_scale` and `lora_steps`, where they are not the default.
        identity: The cell's.
        position: Where its training stood.
        names: Rewards.
    """
    evaluated = evaluator.variant_requests()
    generation = Generation(evaluator.generation.sampler, **settings)
    requests = [e.request for e in evaluated]
    pictures, _ = evaluator.pictures(partial(generate, model), requests, generation=generation)
    return score_rows(identity, position, "final", evaluator.score(pictures, evaluated, names), label)


def settings_of(variant: VariantConfig) -> dict[str, Any]:
    """What `variant_rows` needs, as it is stored in status.json."""
    return variant.model_dump(mode="json", exclude_defaults=True)


def own_sampler_rows(
    evaluator: Evaluator,
    generate: Generate,
    sampler: SamplerConfig,
    identity: Mapping[str, Any],
    position: Mapping[str, Any],
    names: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Scores with the sampler that the cell was trained with, adapter on and off.

    Without them a method that explores with a stochastic sampler would be judged only away from its own policy.

    Args:
        evaluator: Of the run.
        generate: The cell's generation of pictures.
        sampler: The one that it was trained with.
        identity: The cell's.
        position: Where its training stood.
        names: Rewards; all unless told.
    """
    evaluated = evaluator.own_sampler_requests()
    rows: list[dict[str, Any]] = []
    for label, scale in ((OWN_SAMPLER, 1.0), (OWN_SAMPLER_BASE, 0.0)):
        generation = Generation(sampler, lora_scale=scale)
        pictures, _ = evaluator.pictures(generate, [e.request for e in evaluated], generation=generation)
        rows += score_rows(identity, position, "final", evaluator.score(pictures, evaluated, names), label)
    return rows


def missing_variants(status: Mapping[str, Any], grid: Grid, cell: Cell) -> dict[str, dict[str, Any]]:
    """Labels and settings of what a finished cell has not been evaluated with; none where nothing was trained."""
    if status.get("kind") != "training":
        return {}
    wanted: dict[str, dict[str, Any]] = {variant.label: settings_of(variant) for variant in grid.config.variants}
    sampler = grid.arms[cell.arm].sampler
    if sampler != grid.config.sampler:
        wanted[OWN_SAMPLER] = sampler.model_dump()
    return {label: settings for label, settings in wanted.items() if label not in status.get("variants", {})}


def adapter_path(directory: Path, label: str = "") -> Path:
    """Where a cell stores the parameters of its last adapter, or of the one that a variant kept."""
    return directory / "adapter" / f"{label or 'parameters'}.safetensors"


def save_parameters(path: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter's parameters by name."""
    store.write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}))


def load_parameters(model: DiffusionModel, path: Path) -> None:
    """Put stored parameters into the model's adapter."""
    set_parameters(model, load_file(path))


def set_parameters(model: DiffusionModel, values: Mapping[str, torch.Tensor]) -> None:
    """Put values into the model's adapter."""
    for name, parameter in model.adapter_parameters().items():
        parameter.data.copy_(values[name])


def bring_up_to_date(workshop: Workshop, cell: Cell, directory: Path, status: dict[str, Any]) -> None:
    """Score a finished cell with rewards, and evaluate it with variants, that were added since; trains nothing."""
    evaluator, known = workshop.evaluator, status.get("evaluation_rewards", {})
    rewards = [name for name in evaluator.sources if name not in known]
    added = missing_variants(status, workshop.grid, cell)
    if not rewards and not added:
        return
    old = pd.read_parquet(directory / "scores.parquet")
    first = old[(old["point"] == "final") & (old["variant"] == "default")].iloc[0].to_dict()
    identity = {key: first[key] for key in ("cell", "arm", "method", "training_reward", "seed")}
    position = {key: first[key] for key in POSITION}
    rows = scores_of_missing_rewards(evaluator, directory, identity, position, rewards) if rewards else []
    before = dict(status.get("variants", {}))
    if before or added:
        workshop.model.add_adapter(workshop.grid.config.adapter, Randomness(cell.seed, "initial adapter"))
    missing = [(label, settings, rewards) for label, settings in before.items() if rewards]
    missing += [(label, settings, []) for label, settings in added.items() if label not in set(old["variant"])]
    for label, settings, names in missing:
        kept = label == EARLY_STOPPING
        load_parameters(workshop.model, adapter_path(directory, label if kept else ""))
        where = old[old["variant"] == label].iloc[0][list(POSITION)].to_dict() if kept else position
        rows += _rows_of(workshop, label, settings, identity, where, names)
    store.write_parquet(directory / "scores.parquet", [*old.to_dict("records"), *rows], store.SCORE_COLUMNS)
    versions = {**known, **{name: evaluator.versions[name] for name in rewards}}
    update = {
        "evaluation_hash": cell.evaluation_hash,
        "evaluation_rewards": versions,
        "variants": {**before, **added},
    }
    store.write_json(directory / "status.json", {**status, **update})


def _rows_of(
    workshop: Workshop,
    label: str,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
    position: Mapping[str, Any],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    evaluator, model = workshop.evaluator, workshop.model
    if label == OWN_SAMPLER:
        sampler = SamplerConfig.model_validate(settings)
        return own_sampler_rows(evaluator, partial(generate, model), sampler, identity, position, names)
    return variant_rows(evaluator, model, label, settings, identity, position, names)
