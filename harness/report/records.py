"""Records of a run as tables: the only place of the report that reads files.

`results/README.md` documents the schema. A run may be partial: what is missing is counted, never made up. Tables come
out in one order whatever the order in the files, so that a report depends on the records' content only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.report.columns import read_tables

BASE = "base"
DEFAULT_VARIANT = "default"
FINAL = "final"
HELD_OUT = "held-out"
SCHEMA = 1
SCORE_COLUMNS = (
    *("cell", "arm", "method", "training_reward", "seed", "variant", "point", "iteration", "queries"),
    *("denoiser_rows", "train_seconds", "split", "prompt_id", "prompt", "noise_id", "reward", "score"),
)
METRIC_COLUMNS = (
    *("cell", "arm", "method", "training_reward", "seed", "variant", "point", "metric", "prompt_id", "value", "n"),
)
PROBE_COLUMNS = (
    *("cell", "arm", "method", "training_reward", "seed", "probe", "point", "estimator", "guidance", "step", "t"),
    *("prompt_id", "noise_id", "quantity", "value"),
)
COUNTED = ("completed", "diverged")


@dataclass(frozen=True)
class Cell:
    """One planned cell and how it ended; `state` is `planned` where no status was written."""

    name: str
    arm: str
    reward: str
    seed: int
    state: str
    reason: str = ""
    status: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether its scores are results: completed, or diverged with what its last finite checkpoint gave."""
        return self.state in COUNTED


@dataclass(frozen=True)
class RewardInfo:
    """An evaluation reward as the plan describes it; larger is better for every one."""

    name: str
    version: str
    role: str
    differentiable: bool
    unit: str
    description: str


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that a report is made of.

    Attributes:
        folder: The run directory; only pictures are read from it later.
        plan, provenance: `run.json` and `provenance.json` (empty where absent).
        cells: Trained cells in the order of the plan. ``base``: the base model's.
        scores, metrics, updates: Rows of all cells that count, in a fixed order.
        probes: Rows of gradients measured at points of training (empty where the run asked for none).
        comparison: What `compare` found last (empty where it was never called).
        mixed, mixes: Scores of adapters mixed from several rewards', and the mix.json of each.
        timing: Seconds and memory of each arm alone in a fresh process, by label (empty where not measured).
        flops: Floating-point operations of the units that the meter counts (empty where not measured).
        judged: The split that results are about: held-out, or the last one evaluated in a run without it (tuning);
            its rows are called held-out in `scores`.
    """

    folder: Path
    plan: Mapping[str, Any]
    provenance: Mapping[str, Any]
    cells: tuple[Cell, ...]
    base: Cell
    scores: pd.DataFrame
    metrics: pd.DataFrame
    updates: pd.DataFrame
    timing: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    judged: str = HELD_OUT
    probes: pd.DataFrame = field(default_factory=pd.DataFrame)
    mixed: pd.DataFrame = field(default_factory=pd.DataFrame)
    mixes: tuple[Mapping[str, Any], ...] = ()
    comparison: Mapping[str, Any] = field(default_factory=dict)
    flops: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.plan.get("name", self.folder.name))

    @property
    def arms(self) -> tuple[str, ...]:
        """Labels of the arms, in the order of the plan."""
        return tuple(str(arm["label"]) for arm in self.plan["arms"])

    @property
    def inference(self) -> tuple[str, ...]:
        """Arms that change no weights, and spend queries and rows on each picture instead."""
        return self._of_kind("inference")

    @property
    def given(self) -> tuple[str, ...]:
        """Arms that were made elsewhere."""
        return self._of_kind("given")

    @property
    def untrained(self) -> tuple[str, ...]:
        """Arms that this run did not train."""
        return tuple(arm for arm in self.arms if arm in {*self.inference, *self.given})

    @property
    def relation(self) -> str:
        """How arms stand to their training reward: where all were made elsewhere, it only judges."""
        return "judged by" if len(self.given) == len(self.arms) else "trained on"

    def _of_kind(self, kind: str) -> tuple[str, ...]:
        return tuple(str(arm["label"]) for arm in self.plan["arms"] if arm.get("kind") == kind)

    @property
    def constants(self) -> tuple[str, ...]:
        """Arms without seed variance: one cell for each training reward, whatever the seeds of the run."""
        return tuple(str(arm["label"]) for arm in self.plan["arms"] if not arm.get("seeded", True))

    @property
    def training_rewards(self) -> tuple[str, ...]:
        """Rewards that were trained on, in the order of the plan."""
        return tuple(str(name) for name in self.plan["training_rewards"])

    @cached_property
    def rewards(self) -> tuple[RewardInfo, ...]:
        """Rewards that scored pictures; training rewards that are sums of these come first where they are scored."""
        known = [
            RewardInfo(
                str(r["name"]),
                str(r.get("version", "unknown")),
                str(r.get("role", "proxy")),
                bool(r.get("differentiable", False)),
                str(r.get("unit", "") or "score"),
                str(r.get("description", "")),
            )
            for r in self.plan.get("rewards", [])
        ]
        names = {info.name for info in known}
        sums = [name for name in self.training_rewards if name not in names]
        scored = set(self.scores["reward"].unique()) if len(self.scores) else set()
        return tuple(
            [RewardInfo(n, "-", "proxy", True, "weighted sum", "Weighted sum.") for n in sums if n in scored] + known
        )

    @property
    def reference(self) -> str:
        """The arm that others are compared with."""
        return str(self.plan.get("reference_arm") or self.arms[0])

    def cells_of(self, arm: str, reward: str) -> tuple[Cell, ...]:
        """The planned cells of one arm and training reward, by seed."""
        found = (cell for cell in self.cells if cell.arm == arm and cell.reward == reward)
        return tuple(sorted(found, key=lambda cell: cell.seed))

    def prompts(self, split: str) -> tuple[str, ...]:
        """Ids of the evaluated prompts of a split, in the order of the suite; also those only seen in records."""
        named = self.judged if split == HELD_OUT else split
        planned = [str(p) for p in self.plan.get("suite", {}).get("evaluated", {}).get(named, [])]
        rows = self._prompts[self._prompts["split"] == split]
        return (*planned, *sorted({str(p) for p in rows["prompt_id"]} - set(planned)))

    def prompt_text(self, prompt_id: str) -> str:
        """What a prompt says; its id where no record has the text."""
        return self._texts.get(prompt_id, prompt_id)

    @cached_property
    def _prompts(self) -> pd.DataFrame:
        return self.scores[["split", "prompt_id", "prompt"]].drop_duplicates()

    @cached_property
    def _texts(self) -> dict[str, str]:
        known = self._prompts.drop_duplicates("prompt_id")
        return {str(key): str(text) for key, text in zip(known["prompt_id"], known["prompt"], strict=True)}


def load_run(folder: Path) -> Run:
    """Read a run directory.

    Raises:
        UserError: if there is no readable plan, or it is of another schema.
    """
    plan = _read_json(folder / "run.json")
    if not plan:
        raise UserError(f"{folder} is not a run directory: it has no run.json")
    if plan.get("schema") != SCHEMA:
        raise UserError(f"{folder}: records of schema {plan.get('schema')!r}; this version reads schema {SCHEMA}")
    every = [_cell(folder, entry) for entry in plan["cells"]]
    cells = tuple(cell for cell in every if cell.arm != BASE)
    base = next((cell for cell in every if cell.arm == BASE), Cell(BASE, BASE, "", -1, "planned"))
    counted = [cell for cell in (base, *cells) if cell.counts]
    scores = _tables(folder, counted, "scores.parquet", SCORE_COLUMNS)
    splits = list(plan.get("suite", {}).get("evaluated", {HELD_OUT: []}))
    judged = HELD_OUT if HELD_OUT in splits else splits[-1]
    scores["split"] = _renamed(scores["split"], judged, HELD_OUT)
    return Run(
        folder,
        plan,
        _read_json(folder / "provenance.json"),
        cells,
        base,
        _with_sums(scores, [str(name) for name in plan["training_rewards"]]),
        _tables(folder, counted, "metrics.parquet", METRIC_COLUMNS),
        _updates(folder, counted),
        _read_json(folder / "timing.json"),
        judged,
        _tables(folder, counted, "probes.parquet", PROBE_COLUMNS),
        *load_mixes(folder),
        _read_json(folder / "comparison.json"),
        _read_json(folder / "flops.json"),
    )


def _renamed(column: pd.Series, old: str, new: str) -> pd.Series:
    """One value of a column of few values under another name."""
    return column if old == new else column.astype(str).where(column != old, new).astype("category")


def weights(reward: str) -> dict[str, float] | None:
    """The components of a weighted sum such as ``2*a+1*b``; None where the name is not one."""
    result: dict[str, float] = {}
    for term in reward.split("+"):
        factor, star, name = term.partition("*")
        try:
            weight = float(factor) if star else 1.0
        except ValueError:
            return None
        name = name if star else factor
        result[name.strip()] = result.get(name.strip(), 0.0) + weight
    return result


def _with_sums(scores: pd.DataFrame, training_rewards: list[str]) -> pd.DataFrame:
    """Add rows for training rewards that are weighted sums and were scored by their components only."""
    scored = set(scores["reward"].unique())
    keys = [column for column in SCORE_COLUMNS if column not in ("reward", "score")]
    parts = [scores]
    for name in training_rewards:
        terms = weights(name)
        if name in scored or not terms or not set(terms) <= scored:
            continue
        rows = scores[scores["reward"].isin(list(terms))].drop_duplicates([*keys, "reward"])
        wide = rows.pivot(index=keys, columns="reward", values="score")[list(terms)].dropna()
        total = sum(wide[part] * weight for part, weight in terms.items())
        parts.append(wide.index.to_frame(index=False).assign(reward=name, score=pd.Series(total).to_numpy()))
    return pd.concat(parts, ignore_index=True)[list(SCORE_COLUMNS)] if len(parts) > 1 else scores


def load_mixes(folder: Path) -> tuple[pd.DataFrame, tuple[Mapping[str, Any], ...]]:
    """Scores of all mixes of a run directory, and the mix.json of each, by name; mixes without a seed are left out.

    A mix is scored on one split, the one that results are about: it is called held-out here, as in `load_run`.
    """
    empty = pd.DataFrame({column: pd.Series(dtype=object) for column in SCORE_COLUMNS})
    tables, mixes = [], []
    for path in sorted((folder / "mixes").glob("*/mix.json")):
        if (mix := _read_json(path))["seeds"]:
            table = pd.read_parquet(path.with_name("scores.parquet"), columns=list(SCORE_COLUMNS))
            tables.append(table[table["seed"].isin(mix["seeds"])].assign(split=HELD_OUT))
            mixes.append(mix)
    return (pd.concat(tables, ignore_index=True) if tables else empty), tuple(mixes)


def _cell(folder: Path, entry: Mapping[str, Any]) -> Cell:
    status = _read_json(folder / "cells" / str(entry["cell"]) / "status.json")
    return Cell(
        str(entry["cell"]),
        str(entry["arm"]),
        str(entry.get("reward", "")),
        int(entry["seed"]),
        str(status.get("state", "planned")),
        str(status.get("reason") or ""),
        status,
    )


def _tables(folder: Path, cells: list[Cell], file: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """One table of all cells, rows sorted by their content; empty where there is none."""
    paths = [folder / "cells" / cell.name / file for cell in cells]
    return read_tables([path for path in paths if path.is_file()], columns)


def _updates(folder: Path, cells: list[Cell]) -> pd.DataFrame:
    """Per-iteration records of all cells, each with its cell's name."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        path = folder / "cells" / cell.name / "updates.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            rows += [{"cell": cell.name, **json.loads(line)} for line in lines if line.strip()]
    return pd.DataFrame(rows)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is absent."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or remove it and run the command again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
