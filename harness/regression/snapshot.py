"""What is kept of a run to compare later ones with: small, self-contained, and the same for a run and for a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.report.account import cost_row, data_until
from harness.report.gains import Gains
from harness.report.records import BASE, DEFAULT_VARIANT, FINAL, HELD_OUT, SCHEMA, Cell, Run, load_run, weights
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
        rewards: Version of each evaluation reward, with its weights; of a weighted sum those of its terms.
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
    records = _records(run)
    pairs = tuple(sorted({pair for record in records.values() for pair in record.finals}))
    counted = [cell for cell in (run.base, *run.cells) if cell.counts]
    rewards = [reward.name for reward in run.rewards if gains.scored(reward.name)]
    keep = len(counted) * len(rewards) * len(pairs) <= SCORES_KEPT
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
        rewards={name: _version(run, name) for name in rewards},
        arms=tuple(
            {key: arm.get(key) for key in ("label", "method", "version", "kind", "seeded", "config", "sampler")}
            for arm in plan["arms"]
        ),
        training_rewards=run.training_rewards,
        base_sd={reward: gains.sd(reward) for reward in rewards},
        pairs=pairs,
        cells=tuple(_trained(gains, cell, rewards, records, pairs if keep else None) for cell in counted),
        missing=tuple(cell.name for cell in (run.base, *run.cells) if not cell.counts),
        timing=run.timing,
    )


def _version(run: Run, reward: str) -> str:
    """What its numbers depend on."""
    known = {str(entry["name"]): entry for entry in run.plan.get("rewards", [])}
    if reward not in known:
        return ", ".join(f"{name} {_version(run, name)}" for name in sorted(weights(reward) or {}) if name in known)
    files = known[reward].get("weights_sha256") or {}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    version = str(known[reward].get("version", "unknown"))
    return f"{version}, weights {digest[:12]}" if files else version


@dataclass
class _Records:
    """Of one cell and reward: a line for each record, and final scores by prompt and latent."""

    lines: list[str] = field(default_factory=list)
    finals: dict[tuple[str, int], float] = field(default_factory=dict)


def _records(run: Run) -> dict[tuple[str, str], _Records]:
    """All scores of a run by cell and reward, in one pass."""
    found: defaultdict[tuple[str, str], _Records] = defaultdict(_Records)
    columns = [run.scores[name].astype(object).to_numpy() for name in ("cell", "reward", *RECORD)]
    for cell, reward, *record in zip(*columns, strict=True):
        variant, point, split, prompt, noise, *_, score = record
        mine = found[str(cell), str(reward)]
        mine.lines.append("\t".join(map(str, record)))
        if (variant, point, split) == (DEFAULT_VARIANT, FINAL, HELD_OUT) and math.isfinite(score):
            mine.finals[str(prompt), int(noise)] = float(f"{score:.9g}")  # a float32, for a tier that compares to 1e-6
    return found


def _trained(
    gains: Gains,
    cell: Cell,
    rewards: list[str],
    records: Mapping[tuple[str, str], _Records],
    pairs: tuple[tuple[str, int], ...] | None,
) -> Trained:
    scored = {}
    for reward in rewards:
        if cell.arm == BASE:
            value = float(next(iter(gains.base_scores(reward, HELD_OUT).means), math.nan))
        else:
            gain = gains.final(cell.arm, cell.reward, reward)
            value = float(gain.values[gain.seeds.index(cell.seed)])
        mine = records.get((cell.name, reward), _Records())
        kept = None if pairs is None else np.array([mine.finals.get(pair, math.nan) for pair in pairs])
        scored[reward] = Scored(value, _digest(mine.lines), kept)
    known = cost_row(cell)
    every = {**known, "denoiser_rows": cell.status.get("cost", {}).get("denoiser_rows", math.nan)}
    costs = {name: float(str(every[name])) for name in COSTS}
    return Trained(cell.arm, cell.reward, cell.seed, cell.state, scored, costs)


def _digest(lines: list[str]) -> str:
    """Of the records' content, whatever their order: identity, position in training, and the score to the last bit."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ files


def text_of(snapshot: Snapshot) -> str:
    """The snapshot as JSON: one line for each cell, so that a change of a file can be read as a difference."""
    content = {"baseline schema": BASELINE_SCHEMA, **asdict(snapshot)}
    content["pairs"] = [list(pair) for pair in snapshot.pairs]
    cells = content.pop("cells")
    del content["missing"]
    head = json.dumps(_plain(content), indent=1, ensure_ascii=False)
    lines = ",\n  ".join(json.dumps(_plain(cell), ensure_ascii=False) for cell in cells)
    return f'{head[:-2]},\n "cells": [\n  {lines}\n ]\n}}\n'


def read(path: Path) -> Snapshot:
    """A file that `text_of` gave.

    Raises:
        UserError: It is none, of another schema, or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["baseline schema"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no baseline; save one with `python -m harness baseline save RUN NAME`") from None
    if type(schema) is not int or schema != BASELINE_SCHEMA:
        raise UserError(f"{path}: a baseline of schema {schema!r}; this version reads {BASELINE_SCHEMA}: save it again")
    try:
        return _checked(_from(content))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); take it from version control, or save it again"
        ) from None


def _from(content: Mapping[str, Any]) -> Snapshot:
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


def _checked(snapshot: Snapshot) -> Snapshot:
    """The same; raises ValueError where a file that was edited by hand cannot be compared with."""
    labels = {str(arm["label"]) for arm in snapshot.arms}
    names = [(cell.arm, cell.reward, cell.seed) for cell in snapshot.cells]
    wrong = {
        "a text is none": not all(isinstance(t, str) for t in (snapshot.name, snapshot.run, snapshot.until)),
        "git lacks commit and dirty": not {"commit", "dirty"} <= set(snapshot.git),
        "an object is none": not all(
            isinstance(o, dict) for o in (snapshot.platform, snapshot.identity, snapshot.rewards, snapshot.timing)
        ),
        "an arm lacks its method": not all("method" in arm for arm in snapshot.arms),
        "a cell is there twice": len(set(names)) < len(names),
        "a cell is of no arm": not {arm for arm, *_ in names} <= {*labels, BASE},
        "the base model is missing": BASE not in {arm for arm, *_ in names},
        "a seed is no whole number": not all(type(seed) is int for *_, seed in names),
        "a base SD is not above zero": not all(math.isnan(sd) or sd > 0 for sd in snapshot.base_sd.values()),
        "a cell lacks a reward": not all(snapshot.base_sd.keys() <= cell.scored.keys() for cell in snapshot.cells),
        "scores and pairs differ in number": any(
            scored.scores is not None and scored.scores.shape != (len(snapshot.pairs),)
            for cell in snapshot.cells
            for scored in cell.scored.values()
        ),
    }
    if found := [what for what, so in wrong.items() if so]:
        raise ValueError(found[0])
    return snapshot


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
