"""The rewards of the field in one run: trained on and judged by each other, from files in the published layouts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from harness import benchmark, store
from harness.report.build import build_report
from tests.engine.fakes import Bench, plugin_file, run_inline
from tests.rewards import test_imagereward as blip
from tests.rewards.test_clip_rewards import Published

REWARDS = ("hpsv2.1", "pickscore", "imagereward", "aesthetic")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random weights of reduced sizes, as a user gives them: a file, a directory, a head beside its network."""
    folder = tmp_path_factory.mktemp("weights")
    clip = Published(folder).folder
    (folder / "blip").mkdir()
    blip.write(folder / "blip", blip.random_state())
    return {
        "hpsv2.1": str(clip / "hps" / "checkpoint.pt"),
        "pickscore": str(clip / "hf"),
        "imagereward": str(folder / "blip" / "ImageReward.pt"),
        "aesthetic": str(clip / "hf" / "aesthetic.pth"),
    }


@pytest.mark.slow
def test_every_reward_judges_what_was_trained_on_every_other(
    tmp_path: Path, pipeline_directory: Path, weights: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DRaFT-LV and DDPO train on four rewards; the report has the matrix of four by four, and says whose weights."""
    monkeypatch.setattr(benchmark, "run_cells", run_inline)
    monkeypatch.setattr("harness.report.build.build_report", lambda run_dir, out=None: run_dir)
    bench = Bench(tmp_path, plugin_file(tmp_path / "plugins"))
    run = bench.run(
        model=str(pipeline_directory),
        methods=["draft-lv", "ddpo"],
        rewards=list(REWARDS),
        reward_weights=weights,
        budget={"amount": 8, "curve_points": []},
    )
    assert len(bench.ran) == 1 + 2 * 4
    for path in (run / "cells").iterdir():
        assert store.read_json(path / "status.json")["state"] == "completed"
        scores = pd.read_parquet(path / "scores.parquet")
        judged = scores[scores["reward"].isin(REWARDS)]
        assert set(judged["reward"]) == set(REWARDS)
        assert judged["score"].notna().all()
    described = {reward["name"]: reward for reward in store.read_json(run / "run.json")["rewards"]}
    assert all(described[name]["version"].startswith("1+") for name in REWARDS)
    assert described["aesthetic"]["weights_sha256"].keys() == {
        "sac+logos+ava1-l14-linearMSE.pth",
        "model.safetensors",
        "config.json",
    }
    monkeypatch.undo()
    report = build_report(run, tmp_path / "report")
    matrix = pd.read_csv(report.parent / "fig-03-generalisation.csv")
    text = report.read_text(encoding="utf-8")
    for method in ("draft-lv", "ddpo"):
        mine = matrix[matrix["arm"] == method]
        pairs = set(zip(mine["training_reward"], mine["reward"], strict=True))
        assert {(trained, judge) for trained in REWARDS for judge in REWARDS} <= pairs
    assert all(described[name]["version"] in text for name in REWARDS)
