"""Variants of a trained cell: other ways to generate with the adapter that it ended with, or kept on the way.

A variant costs pictures, not training: one that is asked for later is made from the stored adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save

from harness import store
from harness.api import DiffusionModel, Generation, Randomness
from harness.config import VariantConfig
from harness.evaluation import Evaluator
from harness.grid import Cell
from harness.records import POSITION, score_rows, scores_of_missing_rewards
from harness.sampling import generate
from harness.workshop import Workshop

EARLY_STOPPING = "early-stopping"


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
    pictures, _ = evaluator.pictures(
        lambda requests, how: generate(model, requests, how), [e.request for e in evaluated], generation=generation
    )
    return score_rows(identity, position, "final", evaluator.score(pictures, evaluated, names), label)


def settings_of(variant: VariantConfig) -> dict[str, Any]:
    """What `variant_rows` needs, as it is stored in status.json."""
    return variant.model_dump(mode="json", exclude_defaults=True)


def missing_variants(status: Mapping[str, Any], variants: Sequence[VariantConfig]) -> list[VariantConfig]:
    """Those that a finished cell has not been evaluated with; none where nothing was trained."""
    known = status.get("variants", {})
    return [v for v in variants if v.label not in known] if status.get("kind") == "training" else []


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
    rewards = [name for name in evaluator.rewards if name not in known]
    variants = missing_variants(status, workshop.grid.config.variants)
    if not rewards and not variants:
        return
    old = pd.read_parquet(directory / "scores.parquet")
    first = old[(old["point"] == "final") & (old["variant"] == "default")].iloc[0].to_dict()
    identity = {key: first[key] for key in ("cell", "arm", "method", "training_reward", "seed")}
    position = {key: first[key] for key in POSITION}
    rows = scores_of_missing_rewards(evaluator, directory, identity, position, rewards) if rewards else []
    stored = dict(status.get("variants", {}))
    model = workshop.model
    if stored or variants:
        model.add_adapter(workshop.grid.config.adapter, Randomness(cell.seed, "initial adapter"))
    for label, settings in stored.items() if rewards else ():
        kept = label == EARLY_STOPPING
        load_parameters(model, adapter_path(directory, label if kept else ""))
        where = old[old["variant"] == label].iloc[0][list(POSITION)].to_dict() if kept else position
        rows += variant_rows(evaluator, model, label, settings, identity, where, rewards)
    for variant in variants:
        load_parameters(model, adapter_path(directory))
        stored[variant.label] = settings_of(variant)
        rows += variant_rows(evaluator, model, variant.label, stored[variant.label], identity, position)
    store.write_parquet(directory / "scores.parquet", [*old.to_dict("records"), *rows], store.SCORE_COLUMNS)
    versions = {**known, **{name: evaluator.rewards[name].version for name in rewards}}
    update = {"evaluation_hash": cell.evaluation_hash, "evaluation_rewards": versions, "variants": stored}
    store.write_json(directory / "status.json", {**status, **update})
