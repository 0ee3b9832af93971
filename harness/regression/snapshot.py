"""What is kept of a run to compare later ones with: small, self-contained, and the same for a run and for a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.report.account import cost_row, data_until
from harness.report.gains import Gains
from harness.report.records import BASE, DEFAULT_VARIANT, FINAL, HELD_OUT, SCHEMA, Cell, Run, load_run
from harness.stats.seed_means import Array

BASELINE_SCHEMA = 1
SCORES_KEPT = 20_000  # so that a file stays below about 300 kB
RECORD = ("variant", "point", "split", "prompt_id", "noise_id", "iteration", "queries", "denoiser_rows", "score")
# What rounding depends on. Code is not among it: that is what is compared.
DECIDES_BITS = ("platform", "cpu", "vector_instructions", "accelerator", "threads_per_worker")
DECIDING_PACKAGES = (
    *("torch", "diffusers", "transformers", "peft", "numpy", "pillow", "torchvision", "timm", "open_clip_torch"),
)
COSTS = (
    *("queries", "denoiser_rows", "train_seconds", "peak_memory_mib"),
    *("queries_per_picture", "denoiser_rows_per_picture"),
)


@dataclass(frozen=True, eq=False)
class Scored:
    """One cell, scored by one reward on held-out prompts at the end of its budget.

    Attributes:
        value: Gain over the base model on the same prompts and latents, in the reward's unit; of the base model
            itself its mean score. NaN where the reward applies to nothing.
        sha256: Of all records of this cell and reward: every variant, point of training, split, prompt and latent.
        scores: (K,) by the pairs of the snapshot, NaN where the reward does not apply; None where they were too many.
    """

    value: float
    sha256: str
    scores: Array | None = None


@dataclass(frozen=True, eq=False)
class Trained:
    """One cell that counts: completed, or diverged with what its last finite checkpoint gave."""

    arm: str
    reward: str
    seed: int
    state: str
    scored: Mapping[str, Scored]
    costs: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run as far as it is compared.

    Attributes:
        name: Of the baseline, or of the run. ``run``: of the run. ``until``: when its last cell finished (UTC).
        git: Commit and whether the tree was changed. ``command``: that made the run.
        platform: What rounding depends on; bits can be expected to be equal where it is.
        identity: What makes runs comparable: weights, prompts, sampler, budget, evaluation, adapter.
        rewards: Version of each evaluation reward.
        arms: Label, method, version, kind, whether seeded, config and sampler of each.
        base_sd: By reward, the base model's spread within a prompt: the unit of margins.
        pairs: K times prompt and latent of the held-out evaluation.
        cells: Those that count, the base model's first. ``missing``: names of planned ones that do not.
        timing: Seconds and memory of each arm alone in a fresh process, by label.
    """

    name: str
    run: str
    until: str
    command: str
    git: Mapping[str, Any]
    platform: Mapping[str, Any]
    identity: Mapping[str, Any]
    rewards: Mapping[str, str]
    arms: tuple[Mapping[str, Any], ...]
    training_rewards: tuple[str, ...]
    base_sd: Mapping[str, float]
    pairs: tuple[tuple[str, int], ...]
    cells: tuple[Trained, ...]
    missing: tuple[str, ...]
    timing: Mapping[str, Any]

    def find(self, arm: str, reward: str) -> dict[int, Trained]:
        """Cells of an arm and training reward by seed."""
        return {cell.seed: cell for cell in self.cells if (cell.arm, cell.reward) == (arm, reward)}


def take(folder: Path, name: str = "") -> Snapshot:
    """The snapshot of a run directory, complete or not.

    Raises:
        UserError: It holds no run of this schema.
    """
    run = load_run(folder)
    plan, config, provenance = run.plan, run.plan.get("config", {}), run.provenance
    gains = Gains(run)
    scores = run.scores[run.scores["score"].notna()]
    held_out = scores[_final(scores) & (scores["split"] == HELD_OUT)]
    pairs = tuple(sorted({(str(p), int(n)) for p, n in zip(held_out["prompt_id"], held_out["noise_id"], strict=True)}))
    counted = [cell for cell in (run.base, *run.cells) if cell.counts]
    rewards = [reward.name for reward in run.rewards if gains.scored(reward.name)]
    keep = len(counted) * len(rewards) * len(pairs) <= SCORES_KEPT
    by_cell = {str(cell): rows for cell, rows in scores.groupby("cell")}
    return Snapshot(
        name=name or run.name,
        run=run.name,
        until=data_until(run),
        command=str(provenance.get("command", "unknown")),
        git={key: provenance.get("git", {}).get(key, "unknown") for key in ("commit", "dirty")},
        platform={key: provenance.get(key, "unknown") for key in DECIDES_BITS}
        | {package: provenance.get("packages", {}).get(package, "unknown") for package in DECIDING_PACKAGES},
        identity={
            "schema of records": SCHEMA,
            "model": plan.get("model", {}).get("fingerprint"),
            "suite": {key: plan.get("suite", {}).get(key) for key in ("name", "version", "sha256")},
            "sampler": plan.get("sampler"),
            "budget": {key: plan.get("budget", {}).get(key) for key in ("unit", "amount")},
            "evaluation": config.get("evaluation"),
            "adapter": config.get("adapter"),
            "dtype": config.get("dtype"),
            "reward_dtype": config.get("reward_dtype", "float32"),
        },
        rewards={reward.name: reward.version for reward in run.rewards if reward.name in rewards},
        arms=tuple(
            {key: arm.get(key) for key in ("label", "method", "version", "kind", "seeded", "config", "sampler")}
            for arm in plan["arms"]
        ),
        training_rewards=run.training_rewards,
        base_sd={reward: gains.sd(reward) for reward in rewards},
        pairs=pairs,
        cells=tuple(_trained(run, gains, cell, rewards, by_cell, pairs if keep else None) for cell in counted),
        missing=tuple(cell.name for cell in (run.base, *run.cells) if not cell.counts),
        timing=run.timing,
    )


def _final(scores: pd.DataFrame) -> pd.Series:
    return (scores["variant"] == DEFAULT_VARIANT) & (scores["point"] == FINAL)


def _trained(
    run: Run,
    gains: Gains,
    cell: Cell,
    rewards: list[str],
    by_cell: Mapping[str, pd.DataFrame],
    pairs: tuple[tuple[str, int], ...] | None,
) -> Trained:
    rows = by_cell.get(cell.name, run.scores.iloc[:0])
    scored = {}
    for reward in rewards:
        mine = rows[rows["reward"] == reward]
        if cell.arm == BASE:
            value = float(next(iter(gains.base_scores(reward, HELD_OUT).means), math.nan))
        else:
            gain = gains.final(cell.arm, cell.reward, reward)
            value = float(gain.values[gain.seeds.index(cell.seed)])
        scored[reward] = Scored(value, _digest(mine), _by_pair(mine, pairs) if pairs is not None else None)
    known = cost_row(cell)
    every = {**known, "denoiser_rows": cell.status.get("cost", {}).get("denoiser_rows", math.nan)}
    costs = {name: float(str(every[name])) for name in COSTS}
    return Trained(cell.arm, cell.reward, cell.seed, cell.state, scored, costs)


def _digest(rows: pd.DataFrame) -> str:
    """Of the records' content, whatever their order: identity, position in training, and the score to the last bit."""
    lines = sorted("\t".join(map(str, row)) for row in rows[list(RECORD)].itertuples(index=False, name=None))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _by_pair(rows: pd.DataFrame, pairs: tuple[tuple[str, int], ...]) -> Array:
    final = rows[_final(rows) & (rows["split"] == HELD_OUT)]
    found = {
        (str(p), int(n)): float(f"{s:.9g}")  # a float32, or a tier that compares to 1e-6
        for p, n, s in zip(final["prompt_id"], final["noise_id"], final["score"], strict=True)
    }
    return np.array([found.get(pair, math.nan) for pair in pairs], dtype=np.float64)


# ------------------------------------------------------------------------------------------------------ files


def text_of(snapshot: Snapshot) -> str:
    """The snapshot as JSON: one line for each cell, so that a change of a file can be read as a difference."""
    content = {"schema": BASELINE_SCHEMA, **asdict(snapshot)}
    content["pairs"] = [list(pair) for pair in snapshot.pairs]
    cells = content.pop("cells")
    del content["missing"]
    head = json.dumps(_plain(content), indent=1, ensure_ascii=False)
    lines = ",\n  ".join(json.dumps(_plain(cell), ensure_ascii=False) for cell in cells)
    return f'{head[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n'


def read(path: Path) -> Snapshot:
    """A file that `text_of` gave.

    Raises:
        UserError: It is none, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content.get("schema")
    except (ValueError, AttributeError):
        raise UserError(f"{path} holds no baseline; save one with `python -m harness baseline save RUN NAME`") from None
    if schema != BASELINE_SCHEMA:
        raise UserError(f"{path}: a baseline of schema {schema!r}; this version reads {BASELINE_SCHEMA}: save it again")
    cells = tuple(
        Trained(
            cell["arm"],
            cell["reward"],
            cell["seed"],
            cell["state"],
            {name: _scored(one) for name, one in cell["scored"].items()},
            {name: _number(value) for name, value in cell["costs"].items()},
        )
        for cell in content["cells"]
    )
    texts = ("name", "run", "until", "command", "git", "platform", "identity", "rewards", "timing")
    return Snapshot(
        **{key: content[key] for key in texts},
        arms=tuple(content["arms"]),
        training_rewards=tuple(content["training_rewards"]),
        base_sd={name: _number(value) for name, value in content["base_sd"].items()},
        pairs=tuple((prompt, noise) for prompt, noise in content["pairs"]),
        cells=cells,
        missing=(),
    )


def _scored(content: Mapping[str, Any]) -> Scored:
    scores = content["scores"]
    kept = None if scores is None else np.array([_number(score) for score in scores], dtype=np.float64)
    return Scored(_number(content["value"]), content["sha256"], kept)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
