"""A made-up run directory with known gains: the schema of `results/README.md`, written without training anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

POINTS = (32, 64, 128)
BUDGET = 256
ANIMALS = ("elephant", "penguin", "koala", "owl", "giraffe", "crab", "snail", "lobster", "octopus", "cheetah")
COLOURS = ((214, 40, 40), (250, 218, 62), (58, 164, 72), (44, 88, 212), (128, 58, 178), (244, 132, 28))
REWARDS: tuple[tuple[str, str, str], ...] = (
    ("emoji-3d", "proxy", "log-odds"),
    ("emoji-3d-heldout", "held-out", "log-odds"),
    ("emoji-clip", "proxy", "cosine similarity"),
    ("emoji-clip-heldout", "held-out", "cosine similarity"),
    ("jpeg-compressibility", "proxy", "kB"),
    ("object-accuracy", "gold", "probability"),
)
ROWS_PER_QUERY = {"draft": 50.0, "draft-k": 22.0, "draft-lv": 11.0, "refl": 12.0, "ddpo": 60.0, "ddpo-sf": 40.0}


@dataclass(frozen=True)
class Made:
    """What to make up.

    Attributes:
        gains: (arm, training reward, evaluation reward) -> true final gain; (arm, evaluation reward) for any training
            reward; 0 where both are absent.
        diverged, crashed, missing: cells of that state; missing ones were never started.
        no_scores: diverged cells that kept no scores at all.
        images: whether pictures are written.
        gold_on: how many of the prompts of each split the gold metric applies to (None: all).
    """

    arms: Sequence[str] = ("draft", "ddpo")
    training_rewards: Sequence[str] = ("emoji-3d",)
    rewards: Sequence[tuple[str, str, str]] = REWARDS
    seeds: int = 5
    gains: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {
            "training": tuple(f"a {animal} in the garden" for animal in ANIMALS[:6]),
            "held-out": tuple(f"a {animal}" for animal in ANIMALS),
        }
    )
    latents: int = 2
    diverged: Sequence[str] = ()
    crashed: Sequence[str] = ()
    missing: Sequence[str] = ()
    no_scores: Sequence[str] = ()
    images: bool = True
    metrics: bool = True
    gold_on: int | None = None
    seed_sd: float = 0.1
    stream: int = 0


def main_job(**changes: Any) -> Made:
    """Two arms on one reward; the proxy's gain comes at the price of the gold metric."""
    gains = {
        ("draft", "emoji-3d"): 3.4,
        ("draft", "emoji-3d-heldout"): 1.9,
        ("draft", "emoji-clip"): -0.06,
        ("draft", "emoji-clip-heldout"): -0.05,
        ("draft", "jpeg-compressibility"): -0.3,
        ("draft", "object-accuracy"): -0.27,
        ("ddpo", "emoji-3d"): 0.4,
        ("ddpo", "emoji-3d-heldout"): 0.25,
        ("ddpo", "object-accuracy"): 0.01,
    }
    return Made(**{"gains": gains, **changes})


def write_run(folder: Path, made: Made, *, shuffle: int | None = None) -> Path:
    """Write the run below `folder`; `shuffle` permutes the rows of every table and the order of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = {
        split: [(f"{split[:2]}-{index:02d}", text) for index, text in enumerate(texts)]
        for split, texts in made.prompts.items()
    }
    cells = [
        {"cell": f"{arm}--{reward}--seed{seed}", "arm": arm, "reward": reward, "seed": seed}
        for arm in made.arms
        for reward in made.training_rewards
        for seed in range(made.seeds)
    ]
    cells.append({"cell": "base", "arm": "base", "reward": "", "seed": -1})
    (folder / "run.json").write_text(json.dumps(make_plan(made, prompts, cells), indent=1))
    (folder / "provenance.json").write_text(
        json.dumps({"git": {"sha": "0" * 40, "dirty": False}, "versions": {"numpy": "2.4"}, "command": "run --seeds 5"})
    )
    order = np.random.default_rng(shuffle).permutation(len(cells)) if shuffle is not None else range(len(cells))
    for index in order:
        if cells[index]["cell"] not in made.missing:
            _write_cell(folder, made, cells[index], prompts, shuffle)
    return folder


def make_plan(made: Made, prompts: Mapping[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The run.json of a made-up run."""
    return {
        "schema": 1,
        "name": "made-up-0a1b2c3d",
        "config": {"preset": "quick", "methods": list(made.arms), "sampler": {"steps": 10, "eta": 0.0}},
        "passed": {"methods": list(made.arms)},
        "arms": [
            {
                "label": arm,
                "method": arm.split(" ")[0],
                "version": "1",
                "overrides": {"k": 5} if arm == "draft-k" else {},
                "config": {"learning_rate": 0.001, "batch": 4, "k": 5},
                "description": f"The method {arm}.",
                "needs_reward_gradient": not arm.startswith("ddpo"),
            }
            for arm in made.arms
        ],
        "reference_arm": made.arms[0],
        "training_rewards": list(made.training_rewards),
        "rewards": [
            {
                "name": name,
                "version": "1",
                "role": role,
                "differentiable": role != "gold",
                "unit": unit,
                "family": "emoji",
                "description": f"What {name} measures.",
            }
            for name, role, unit in made.rewards
        ],
        "seeds": list(range(made.seeds)),
        "suite": {
            "name": "emoji-animals",
            "version": "1",
            "sha256": "ab" * 32,
            "evaluated": {split: [identity for identity, _ in items] for split, items in prompts.items()},
        },
        "model": {"name": "emoji", "fingerprint": "c0ffee", "parameters": 3_200_000, "adapter_parameters": 12_000},
        "sampler": {"steps": 10, "spacing": "trailing", "eta": 0.0, "guidance": 4.0, "final_alpha": "one"},
        "budget": {"unit": "queries", "amount": BUDGET, "curve_points": [*POINTS, BUDGET]},
        "cells": cells,
    }


def _write_cell(
    folder: Path, made: Made, cell: dict[str, Any], prompts: Mapping[str, Any], shuffle: int | None
) -> None:
    name = cell["cell"]
    state = "diverged" if name in made.diverged else "crashed" if name in made.crashed else "completed"
    place = folder / "cells" / name
    place.mkdir(parents=True)
    cost = cell_cost(cell["arm"], BUDGET)
    status = {
        "state": state,
        "reason": "the loss is NaN" if state == "diverged" else "",
        "iterations": 64,
        "seconds": {"train": 30.0 + cost["forward_rows"] / 1e3 + cell["seed"], "evaluate": 12.0},
        "peak_memory_mib": 812.0 + max(cell["seed"], 0),
        "cost": cost,
        "training_hash": "t0",
        "evaluation_hash": "e0",
        "started": "2026-01-01T00:00:00Z",
        "finished": "2026-01-01T00:01:00Z",
    }
    (place / "status.json").write_text(json.dumps(status))
    if state == "crashed":
        return
    if name not in made.no_scores:
        scores, metrics = _tables(made, cell, prompts)
        if shuffle is not None:
            scores = scores.sample(frac=1, random_state=shuffle)
            metrics = metrics.sample(frac=1, random_state=shuffle)
        scores.to_parquet(place / "scores.parquet", index=False)
        if made.metrics:
            metrics.to_parquet(place / "metrics.parquet", index=False)
    if cell["arm"] != "base":
        lines = [
            {"iteration": i, "reward": -2 + 0.02 * i, "loss": 0.5, "gradient_norm": 0.1, "seconds": 0.4}
            for i in range(3)
        ]
        (place / "updates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if made.images and name not in made.no_scores:
        _draw_all(place / "images" / "final", made, cell, prompts)


def cell_cost(arm: str, queries: float) -> dict[str, float]:
    """The meter's totals after so many queries."""
    rows = 0.0 if arm == "base" else ROWS_PER_QUERY.get(arm.split(" ")[0], 30.0) * queries
    gradient = 0.0 if arm.startswith("ddpo") or arm == "base" else queries
    queries = 0.0 if arm == "base" else queries
    return {
        "queries": queries,
        "reward_gradients": gradient,
        "forward_rows": rows * (1.0 if not gradient else 0.4),
        "gradient_rows": rows * 0.2,
        "recomputed_rows": rows * 0.2 if gradient else 0.0,
        "backward_rows": rows * 0.2,
        "decodes": queries,
    }


def _tables(made: Made, cell: dict[str, Any], prompts: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores = prompt and latent effects shared by all cells, plus the gain, plus the seed's luck."""
    shared = np.random.default_rng([made.stream, 1])
    own = np.random.default_rng([made.stream, 2, abs(hash_of(cell["cell"]))])
    base = cell["arm"] == "base"
    points: list[tuple[str, float]] = [] if base else [(str(p), float(p)) for p in POINTS]
    points.append(("final", 0.0 if base else float(BUDGET)))
    luck = {(point, name): own.normal(0, made.seed_sd) for point, _ in points for name, _, _ in made.rewards}
    common = {"cell": cell["cell"], "arm": cell["arm"], "method": cell["arm"].split(" ")[0]}
    common |= {"training_reward": cell["reward"], "seed": cell["seed"], "variant": "default"}
    rows, measured = [], []
    for split, items in prompts.items():
        for index, (prompt_id, text) in enumerate(items):
            for noise_id in range(made.latents):
                for name, role, unit in made.rewards:
                    scale = _scale(unit)
                    level = _level(name) + shared.normal(0, 0.7 * scale) + shared.normal(0, 0.5 * scale)
                    if role == "gold" and made.gold_on is not None and index >= made.gold_on:
                        continue
                    for point, spent in points:
                        if point != "final" and (split != "held-out" or noise_id > 0):
                            continue
                        full = 0.0 if base else _full(made, cell, name)
                        change = 0.0 if base else full * np.log2(1 + spent) / np.log2(1 + BUDGET)
                        change += 0.0 if base else luck[point, name] * scale + own.normal(0, 0.1 * scale)
                        rows.append(
                            {
                                **common,
                                "point": point,
                                "iteration": int(spent / 4),
                                "queries": spent,
                                "denoiser_rows": sum(
                                    v for k, v in cell_cost(cell["arm"], spent).items() if "rows" in k
                                ),
                                "train_seconds": spent * ROWS_PER_QUERY.get(common["method"], 30.0) / 250,
                                "split": split,
                                "prompt_id": prompt_id,
                                "prompt": text,
                                "noise_id": noise_id,
                                "reward": name,
                                "score": level + change,
                            }
                        )
    drop = 0.0 if base else min(abs(_full(made, cell, cell["reward"])), 3.5)
    for index, (prompt_id, _) in enumerate(prompts["held-out"][:4]):
        for metric, value in (("vendi", 5.6 - 0.9 * drop), ("drift_latent_rms", 0.3 * drop)):
            noisy = value + own.normal(0, 0.15) + 0.1 * index
            line = {**common, "point": "final", "metric": metric, "prompt_id": prompt_id, "value": noisy, "n": 8}
            if metric == "vendi" or not base:
                measured.append(line)
    return pd.DataFrame(rows), pd.DataFrame(measured)


def _full(made: Made, cell: dict[str, Any], reward: str) -> float:
    """The true gain: of this training reward, or of any."""
    arm = cell["arm"]
    return made.gains.get((arm, cell["reward"], reward), made.gains.get((arm, reward), 0.0))


def hash_of(text: str) -> int:
    """The same number for the same text in every process."""
    return sum((index + 1) * ord(letter) for index, letter in enumerate(text))


def _scale(unit: str) -> float:
    return {"log-odds": 1.0, "probability": 0.2, "cosine similarity": 0.05}.get(unit, 0.5)


def _level(name: str) -> float:
    return {"emoji-3d": -2.0, "emoji-3d-heldout": -1.6, "object-accuracy": 0.36}.get(name, 0.3)


def _draw_all(folder: Path, made: Made, cell: dict[str, Any], prompts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    gain = max(_full(made, cell, cell["reward"]), 0.0)
    for split in ("training", "held-out"):
        for index, (prompt_id, _) in enumerate(prompts[split]):
            for noise_id in range(made.latents):
                picture = draw_picture(index, noise_id, cell["seed"], excited=gain >= 1)
                picture.save(folder / f"{prompt_id}--{noise_id}.png")


def draw_picture(index: int, noise_id: int, seed: int, *, excited: bool) -> Image.Image:
    """A face in the colour of the prompt; another background and a shine where the reward was learned."""
    picture = Image.new("RGB", (64, 64), (150, 110, 200) if excited else (244, 244, 244))
    pen = ImageDraw.Draw(picture)
    reach = 18 + (3 * index + noise_id + max(seed, 0)) % 6
    pen.ellipse((32 - reach, 34 - reach, 32 + reach, 34 + reach), fill=COLOURS[index % len(COLOURS)])
    if excited:
        pen.ellipse((22, 20, 32, 28), fill=(255, 255, 255))
    for x in (25, 39):
        pen.ellipse((x - 3, 29, x + 3, 35), fill=(20, 20, 20))
    return picture


def grid_job(**changes: Any) -> Made:
    """Six arms on three rewards with three seeds and one latent: 54 cells, one of them diverged without a trace."""
    strength = {"draft": 1.0, "draft-k": 0.8, "draft-lv": 0.9, "refl": 0.5, "ddpo": 0.15, "ddpo-sf": 0.05}
    top = {"emoji-3d": 3.2, "emoji-clip": 0.12, "jpeg-compressibility": 1.1}
    gains: dict[tuple[str, ...], float] = {}
    for arm, factor in strength.items():
        for reward, gain in top.items():
            gains[arm, reward, reward] = factor * gain
            gains[arm, reward, f"{reward}-heldout"] = 0.6 * factor * gain
            gains[arm, reward, "object-accuracy"] = -0.2 * factor if reward == "emoji-3d" else 0.05 * factor
    lost = ("refl--emoji-clip--seed1",)
    grid = {"arms": tuple(strength), "training_rewards": tuple(top), "seeds": 3, "latents": 1, "gains": gains}
    return Made(**{**grid, "diverged": lost, "no_scores": lost, **changes})
