"""A made-up run of a full grid, written fast: twenty methods on four rewards with ten seeds, 3.5 million scores."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tests.report.synthetic import ANIMALS, BUDGET, POINTS, Made, cell_cost, draw_picture, make_plan

TRAINED = ("emoji-3d", "emoji-clip", "jpeg-compressibility", "emoji-style")
REWARDS = (
    ("emoji-3d", "proxy", "log-odds"),
    ("emoji-3d-heldout", "held-out", "log-odds"),
    ("emoji-clip", "proxy", "cosine similarity"),
    ("emoji-clip-heldout", "held-out", "cosine similarity"),
    ("jpeg-compressibility", "proxy", "kB"),
    ("emoji-style", "proxy", "log-odds"),
    ("emoji-style-heldout", "held-out", "log-odds"),
    ("object-accuracy", "gold", "probability"),
)
METRICS = ("vendi", "pairwise_distance", "drift_latent_rms", "drift_pixel_rms")
BASE_METRICS = ("vendi", "pairwise_distance")
UPDATES = 64
PICTURED_PROMPTS = 8


@dataclass(frozen=True)
class Size:
    """How many of each."""

    arms: int = 20
    rewards: int = 4
    seeds: int = 10
    prompts: int = 100
    training_prompts: int = 25
    latents: int = 2


def write_large_run(folder: Path, size: Size) -> Path:
    """Write the run below `folder`: the schema of `results/README.md`, all that a report reads of a finished run."""
    made = _made(size)
    prompts = {
        split: [(f"{split[:2]}-{i:03d}", t) for i, t in enumerate(texts)] for split, texts in made.prompts.items()
    }
    cells: list[dict[str, Any]] = [
        {"cell": f"{arm}--{reward}--seed{seed}", "arm": arm, "reward": reward, "seed": seed}
        for arm in made.arms
        for reward in made.training_rewards
        for seed in range(made.seeds)
    ]
    cells.append({"cell": "base", "arm": "base", "reward": "", "seed": -1})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(make_plan(made, prompts, cells)))
    (folder / "provenance.json").write_text(json.dumps({"git": {"sha": "0" * 40}, "command": "run"}))
    pictures = _pictures(folder / "pictures")
    for tuned in (False, True):
        scores, metrics = _Rows(prompts, size.latents, tuned), _Measured(prompts["held-out"], tuned)
        for index, cell in enumerate(cells):
            if (cell["arm"] != "base") == tuned:
                _write_cell(folder, cell, index, scores, metrics, made, pictures)
    return folder


def _made(size: Size) -> Made:
    arms = tuple(f"method-{i:02d}" for i in range(size.arms))
    texts = tuple(f"a {ANIMALS[i % len(ANIMALS)]} with {i} balloons" for i in range(size.prompts))
    prompts = {"training": tuple(f"{text} in the garden" for text in texts[: size.training_prompts]), "held-out": texts}
    return Made(arms, TRAINED[: size.rewards], REWARDS, size.seeds, prompts=prompts, latents=size.latents)


class _Rows:
    """The columns of scores.parquet that all cells share, and the level of each row before any training."""

    def __init__(self, prompts: dict[str, list[tuple[str, str]]], latents: int, tuned: bool) -> None:
        final = [
            ("final", float(BUDGET) if tuned else 0.0, split, prompt, noise)
            for split, items in prompts.items()
            for prompt in items
            for noise in range(latents)
        ]
        curve = [(str(p), float(p), "held-out", prompt, 0) for p in POINTS for prompt in prompts["held-out"]]
        pictures = final + curve * tuned
        count = len(REWARDS)
        point, spent, split, prompt, noise = zip(*pictures, strict=True)
        queries = np.repeat(spent, count)
        self.frame = pd.DataFrame(
            {
                "variant": "default",
                "point": np.repeat(point, count),
                "iteration": (queries / 4).astype(np.int64),
                "queries": queries,
                "denoiser_rows": 40.0 * queries,
                "train_seconds": 0.2 * queries,
                "split": np.repeat(split, count),
                "prompt_id": np.repeat([identity for identity, _ in prompt], count),
                "prompt": np.repeat([text for _, text in prompt], count),
                "noise_id": np.repeat(np.asarray(noise, dtype=np.int64), count),
                "reward": [name for name, _, _ in REWARDS] * len(pictures),
            }
        )
        self.table = pa.Table.from_pandas(self.frame, preserve_index=False)
        self.progress = np.log2(1 + queries) / np.log2(1 + BUDGET)
        keys = self.frame["prompt_id"] + self.frame["noise_id"].astype(str) + self.frame["reward"]
        self.level = pd.util.hash_array(keys.to_numpy(dtype=object)).astype(np.float64) / 2**64 - 0.5
        self.rewards = self.frame["reward"].to_numpy(dtype=object)


class _Measured:
    """The columns of metrics.parquet that all cells share."""

    def __init__(self, prompts: list[tuple[str, str]], tuned: bool) -> None:
        points = [*map(str, POINTS), "final"] if tuned else ["final"]
        names = METRICS if tuned else BASE_METRICS
        rows = [(p, m, identity) for p in points for m in names for identity, _ in prompts[:PICTURED_PROMPTS]]
        point, metric, prompt = zip(*rows, strict=True)
        self.frame = pd.DataFrame({"variant": "default", "point": point, "metric": metric, "prompt_id": prompt, "n": 8})


def _write_cell(
    folder: Path, cell: dict[str, Any], index: int, rows: _Rows, measured: _Measured, made: Made, pictures: list[Path]
) -> None:
    generator = np.random.default_rng([7, index])
    place = folder / "cells" / cell["cell"]
    (place / "images" / "final").mkdir(parents=True)
    base = cell["arm"] == "base"
    skill = 0.0 if base else 1.5 * made.arms.index(cell["arm"]) / len(made.arms)
    gains = {
        name: skill * (1.0 if name == cell["reward"] else 0.3) + generator.normal(0, 0.1) for name, _, _ in REWARDS
    }
    gain = np.array([gains[name] for name in rows.rewards]) * rows.progress
    common = {"cell": cell["cell"], "arm": cell["arm"], "method": cell["arm"]}
    common |= {"training_reward": cell["reward"]}
    table = rows.table.append_column("score", pa.array(rows.level + gain + generator.normal(0, 0.1, len(gain))))
    metrics = measured.frame.assign(
        **common, seed=cell["seed"], value=3 + generator.normal(0, 0.2, len(measured.frame))
    )
    for name, value in common.items():
        table = table.append_column(name, pa.array([value] * len(table)))
    table = table.append_column("seed", pa.array([cell["seed"]] * len(table), pa.int64()))
    pq.write_table(table, place / "scores.parquet")
    metrics.to_parquet(place / "metrics.parquet", index=False)
    (place / "status.json").write_text(json.dumps(_status(cell)))
    line = {
        "loss": 0.5,
        "gradient_norm": 0.1,
        "seconds": 0.4,
        "memory_mib": 800.0,
        "queries": 4.0,
        "forward_rows": 40.0,
    }
    lines = [] if base else [json.dumps({"iteration": i, "reward": 0.02 * i, **line}) + "\n" for i in range(UPDATES)]
    (place / "updates.jsonl").write_text("".join(lines))
    for i in range(PICTURED_PROMPTS):
        os.link(pictures[(index + i) % len(pictures)], place / "images" / "final" / f"he-{i:03d}--0.png")


def _status(cell: dict[str, Any]) -> dict[str, Any]:
    return {
        "state": "completed",
        "iterations": UPDATES,
        "seconds": {"train": 50.0 + cell["seed"], "evaluate": 12.0},
        "peak_memory_mib": 800.0,
        "cost": cell_cost(cell["arm"], BUDGET),
        "started": "2026-01-01T00:00:00Z",
        "finished": "2026-01-01T00:01:00Z",
    }


def _pictures(folder: Path) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(24)]
    for i, path in enumerate(paths):
        draw_picture(i, 0, i % 3, excited=i % 2 == 0).save(path)
    return paths
