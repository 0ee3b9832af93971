"""Trackers get what the records hold, once, in order, and never stand in the way of training."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness import store
from harness.config import resolve
from harness.errors import UserError
from harness.grid import Grid
from harness.tracking import streaming
from harness.tracking.cell_stream import COSTS, CellStream
from harness.tracking.tracker import Tracker
from tests.engine.fakes import Bench, settings

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="the extra `tensorboard` is not installed"
)
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the extra `wandb` is not installed")

History = dict[str, list[tuple[int, float]]]


def recorded(cell: Path) -> History:
    """What every tracker must show of a cell, from its records and by another way than the harness's."""
    history: History = {}
    path = cell / "updates.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        content = json.loads(line)
        step = content.pop("iteration")
        for name, value in content.items():
            history.setdefault(f"{'cost' if name in COSTS else 'train'}/{name}", []).append((step, value))
    scores = pd.read_parquet(cell / "scores.parquet")
    scores = scores[scores["variant"] == "default"]
    for reward in scores["reward"].unique():
        for split in scores["split"].unique():
            for point in scores["point"].unique():
                mine = scores[(scores["reward"] == reward) & (scores["split"] == split) & (scores["point"] == point)]
                if len(mine):
                    means = [mine[mine["prompt_id"] == prompt]["score"].mean() for prompt in mine["prompt_id"].unique()]
                    place = history.setdefault(f"eval/{reward}/{split}", [])
                    place.append((int(mine["iteration"].iloc[0]), sum(means) / len(means)))
    return {name: sorted(values, key=lambda pair: pair[0]) for name, values in history.items()}


def assert_same_history(shown: Mapping[str, list[tuple[int, float]]], cell: Path, rtol: float = 1e-12) -> None:
    """The same metrics with the same steps and values (TensorBoard keeps 32 bits)."""
    expected = recorded(cell)
    assert expected, f"{cell} holds nothing"
    assert set(shown) == set(expected)
    for name, values in expected.items():
        assert [step for step, _ in shown[name]] == [step for step, _ in values], name
        assert [value for _, value in shown[name]] == pytest.approx([v for _, v in values], rel=rtol, nan_ok=True), name


def board(run: Path, cell: str) -> History:
    """What TensorBoard itself reads of a cell, without throwing any value away."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / cell), size_guidance={SCALARS: 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def cells(run: Path) -> list[str]:
    """Names of the run's cells, the base among them."""
    return sorted(path.name for path in (run / "cells").iterdir())


@needs_tensorboard
def test_tensorboard_shows_the_records(bench: Bench) -> None:
    """Every value of updates.jsonl and every mean score, at its iteration, in one directory for each cell."""
    run = bench.run(trackers=["tensorboard"], seeds=[0, 1])
    assert len(cells(run)) == 5
    for cell in cells(run):
        assert_same_history(board(run, cell), run / "cells" / cell, rtol=1e-6)
    shown = board(run, "draft--" + cells(run)[-1].partition("--")[2])
    assert shown["cost/queries"][-1] == (8, 16.0)


@needs_tensorboard
def test_a_tracker_that_is_named_later_gets_what_ended_before(bench: Bench) -> None:
    """The same command with a tracker trains nothing and shows everything; once more, it changes nothing."""
    run = bench.run(methods=["draft"])
    assert not (run / "tensorboard").exists()
    bench.run(methods=["draft"], trackers=["tensorboard"])
    assert bench.ran == []
    for cell in cells(run):
        assert_same_history(board(run, cell), run / "cells" / cell, rtol=1e-6)
    before = {path: path.stat().st_mtime_ns for path in (run / "tensorboard").rglob("*")}
    bench.run(methods=["draft"], trackers=["tensorboard"])
    assert {path: path.stat().st_mtime_ns for path in (run / "tensorboard").rglob("*")} == before


@needs_tensorboard
def test_a_cell_that_is_run_again_has_every_step_once(bench: Bench) -> None:
    """A cell that lost its end is trained anew, and the directory shows it as if nothing had happened."""
    run = bench.run(methods=["draft"], trackers=["tensorboard"])
    again = next(cell for cell in cells(run) if cell != "base")
    (run / "cells" / again / "status.json").unlink()
    bench.run(methods=["draft"], trackers=["tensorboard"])
    assert bench.ran == [again]
    assert_same_history(board(run, again), run / "cells" / again, rtol=1e-6)


@needs_wandb
def test_wandb_offline_holds_the_records(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of W&B's runs for each cell, in the run's group, with its configuration and the same names as elsewhere."""
    from tests.tracking.offline_files import read_offline

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = bench.run(methods=["draft"], trackers=["wandb"])
    ids = store.read_json(run / "wandb" / "ids.json")
    assert sorted(ids) == cells(run)
    for cell in cells(run):
        (folder,) = (run / "wandb").glob(f"offline-run-*-{ids[cell]}")
        found = read_offline(folder)
        history: History = {}
        for step, values in found.history:
            for name, value in values.items():
                history.setdefault(name, []).append((step, value))
        assert_same_history(history, run / "cells" / cell)
        assert len({step for step, _ in found.history}) == len(found.history)
        assert (found.group, found.name, found.project, found.exit_code) == ("run", cell, "draft-bench", 0)
        assert found.config["arm"] == ("base" if cell == "base" else "draft")
    bench.run(methods=["draft"], trackers=["wandb"])
    assert len(list((run / "wandb").glob("offline-run-*"))) == len(ids), "what is there was written again"


class Broken(Tracker):
    """Fails at its second row."""

    def __init__(self, run_dir: Path) -> None:
        self.rows = 0

    def holds(self, cell: str) -> bool:
        """Nothing."""
        return False

    def begin(self, cell: str, config: Mapping[str, Any]) -> None:
        """Works."""

    def log(self, cell: str, step: int, metrics: Mapping[str, float]) -> None:
        """Works once."""
        self.rows += 1
        if self.rows > 1:
            raise OSError("no space left on device")

    def end(self, cell: str, state: str) -> None:
        """Works."""


class Kept(Tracker):
    """Keeps what it is told."""

    told: list[tuple[str, str]]

    def __init__(self, run_dir: Path) -> None:
        self.told = []

    def holds(self, cell: str) -> bool:
        """Nothing."""
        return False

    def begin(self, cell: str, config: Mapping[str, Any]) -> None:
        """Note it."""
        self.told.append((cell, "begin"))

    def log(self, cell: str, step: int, metrics: Mapping[str, float]) -> None:
        """Note it."""
        self.told.append((cell, str(step)))

    def end(self, cell: str, state: str) -> None:
        """Note it."""
        self.told.append((cell, state))


def test_a_tracker_that_fails_costs_the_run_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning on the screen and in the log; the cells and the other tracker go on."""
    kept = Kept(bench.folder)
    monkeypatch.setattr(streaming, "TRACKERS", {"wandb": Broken, "tensorboard": lambda run_dir: kept})
    monkeypatch.setattr(streaming, "check_trackers", lambda names: None)
    monkeypatch.setattr("harness.benchmark.check_trackers", lambda names: None)
    run = bench.run(methods=["draft"], trackers=["wandb", "tensorboard"])
    assert {store.read_json(run / "cells" / cell / "status.json")["state"] for cell in cells(run)} == {"completed"}
    assert capsys.readouterr().err.count("wandb is left out from here on: OSError: no space left on device") == 1
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["event"] for line in log].count("tracker failed") == 1
    draft = next(cell for cell in cells(run) if cell != "base")
    steps = [what for cell, what in kept.told if cell == draft]
    assert steps[0] == "begin"
    assert steps[-1] == "completed"
    assert [int(step) for step in steps[1:-1]] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]  # two evaluations


def test_a_missing_package_is_said_before_anything_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs the extra."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(UserError, match=r"pip install 'draft-bench\[tensorboard\]'"):
        bench.run(trackers=["tensorboard"])
    assert not (bench.folder / "run").exists()


def test_a_name_that_is_no_tracker_is_refused(bench: Bench) -> None:
    """By its name."""
    with pytest.raises(UserError, match="mlflow"):
        bench.run(trackers=["mlflow"])


def test_trackers_change_no_hash(bench: Bench) -> None:
    """Cells and the directory of a run are the same with and without."""
    passed = settings(bench.plugins, bench.folder / "run") | {"out": None}
    plain, tracked = (Grid(resolve({**passed, "trackers": names})) for names in ([], ["tensorboard"]))
    assert plain.cells == tracked.cells
    assert plain.run_directory() == tracked.run_directory()
    assert plain.describe({})["config"] == tracked.describe({})["config"]


def score_row(point: str, iteration: int, score: float) -> dict[str, Any]:
    """A row of scores.parquet."""
    text = dict.fromkeys(("cell", "arm", "method", "training_reward", "prompt"), "x")
    numbers = {"seed": 0, "iteration": iteration, "queries": 4.0, "denoiser_rows": 8.0, "train_seconds": 1.0}
    place = {"variant": "default", "point": point, "split": "held-out", "prompt_id": "a", "noise_id": 0, "reward": "r"}
    return {**text, **numbers, **place, "score": score}


def write_lines(cell: Path, *iterations: int) -> None:
    """Append to the log."""
    for iteration in iterations:
        store.append_line(cell / "updates.jsonl", {"iteration": iteration, "reward": iteration / 2, "queries": 4})


def test_rows_come_once_and_in_order_while_files_grow(tmp_path: Path) -> None:
    """Torn lines wait for their end, points for the line of their iteration, and the end repeats no point."""
    stream = CellStream(tmp_path)
    assert stream.new() == []
    write_lines(tmp_path, 1)
    with (tmp_path / "updates.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"iteration": 2, "rew')
    store.write_parquet(tmp_path / "points" / "8.parquet", [score_row("8", 2, 0.5)], store.SCORE_COLUMNS)
    assert stream.new() == [(1, {"train/reward": 0.5, "cost/queries": 4.0})]
    with (tmp_path / "updates.jsonl").open("a", encoding="utf-8") as file:
        file.write('ard": NaN, "note": "text"}\n')
    write_lines(tmp_path, 3)
    first, point, last = stream.new()
    assert (first[0], list(first[1])) == (2, ["train/reward"])
    assert math.isnan(first[1]["train/reward"])
    assert point == (2, {"eval/r/held-out": 0.5})
    assert last[0] == 3
    assert stream.new() == []
    store.write_parquet(
        tmp_path / "scores.parquet",
        [score_row("8", 2, 0.5), score_row("12", 3, 0.6), score_row("final", 3, 0.7)],
        store.SCORE_COLUMNS,
    )
    assert stream.new() == [(3, {"eval/r/held-out": 0.6}), (3, {})], "one value for a step, that of the curve"
    assert stream.new() == []


def test_a_pair_of_latents_weighs_no_more_than_one(tmp_path: Path) -> None:
    """The mean over prompts of the mean over latents, as in the report."""
    rows = [score_row("final", 0, 1.0), score_row("final", 0, 3.0) | {"noise_id": 1}]
    rows.append(score_row("final", 0, 5.0) | {"prompt_id": "b"})
    rows.append(score_row("final", 0, 100.0) | {"variant": "lora-scale=0.5"})
    store.write_parquet(tmp_path / "scores.parquet", rows, store.SCORE_COLUMNS)
    assert CellStream(tmp_path).new() == [(0, {"eval/r/held-out": 3.5})]
