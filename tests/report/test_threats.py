"""What limits the conclusions is said, with numbers from the records."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from harness.report.analysis import analyse
from harness.report.narrative import threats
from harness.report.records import load_run
from tests.report.synthetic import main_job, write_run

REWARDS = ("emoji-3d", "jpeg-compressibility")


def gains(run: Path, arm: str, reward: str) -> np.ndarray:
    """(S,) final gains over the base model on held-out prompts, straight from the files."""
    keys = ["prompt_id", "noise_id"]

    def scores(cell: str) -> pd.Series:
        table = pd.read_parquet(run / "cells" / cell / "scores.parquet")
        table = table[(table["reward"] == reward) & (table["split"] == "held-out") & (table["point"] == "final")]
        return table[table["variant"] == "default"].set_index(keys)["score"]

    base = scores("base")
    return np.array([(scores(f"{arm}--{reward}--seed{s}") - base).groupby("prompt_id").mean().mean() for s in range(5)])


def test_rewards_of_a_seed_are_said_to_be_taken_as_independent(tmp_path: Path) -> None:
    """With several training rewards the correlation over seeds of the arms' differences stands among the threats."""
    run = write_run(tmp_path / "run", main_job(training_rewards=REWARDS, arms=("draft", "ddpo"), seeds=5))
    analysis = analyse(load_run(run))
    (line,) = (text for text in threats(analysis) if "to be independent" in text)
    differences = [gains(run, "ddpo", reward) - gains(run, "draft", reward) for reward in REWARDS]
    expected = np.mean([np.corrcoef(x, y)[0, 1] for x, y in combinations(differences, 2)])
    found = re.search(r"correlated by ([+−]?[\d.]+)", line)
    assert found
    assert abs(float(found[1].replace("−", "-")) - expected) < 0.006


def test_one_training_reward_pools_nothing(tmp_path: Path) -> None:
    """With one training reward there is nothing to be said about others."""
    run = write_run(tmp_path / "run", main_job(training_rewards=REWARDS[:1], arms=("draft", "ddpo"), seeds=3))
    assert not any("to be independent" in text for text in threats(analyse(load_run(run))))
