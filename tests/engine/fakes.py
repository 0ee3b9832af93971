"""Runs of seconds: the Gaussian model, a handful of prompts, and cells that run in the test's own process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness import benchmark, store
from harness.config import RunConfig, resolve
from harness.executors.local import Event, serve
from harness.grid import Cell

PLUGINS = Path(__file__).with_name("plugins.py")
CLOCKS = ["seconds", "memory_mib", "train_seconds"]


def plugin_file(folder: Path) -> Path:
    """A copy of the plug-ins in a folder of the test's own, where it can put steering files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(PLUGINS, folder / "plugins.py"))


def settings(plugins: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run of two cells besides the base, with changes (nested sections by dictionaries)."""
    small = {
        "model": "gaussian",
        "preset": "smoke",
        "methods": ["draft", "ddpo"],
        "rewards": [f"{plugins}:Quadratic"],
        "seeds": [0],
        "device": "cpu",
        "workers": 1,
        "timing": False,
        "out": str(out),
        "budget": {"amount": 16, "curve_points": [8]},
        "evaluation": {
            "prompts": {"training": 2, "held-out": 3},
            "latents": 2,
            "curve_latents": 1,
            "diversity_prompts": 1,
            "diversity_latents": 2,
            "batch": 4,
        },
    }
    return {**small, **changes}


@dataclass
class Inline:
    """The worker's end of a pipe with nobody at the other end: gives cells, and keeps what is answered."""

    waiting: list[Cell]
    on_event: Callable[[Event], None]
    ends: dict[str, str] = field(default_factory=dict)

    def recv(self) -> Cell:
        """The next cell."""
        if not self.waiting:
            raise EOFError
        return self.waiting.pop(0)

    def send(self, event: Event) -> None:
        """Pass an event on, and remember how a cell ended."""
        self.on_event(event)
        if event.ends:
            self.ends[event.cell] = "crashed" if event.kind == "crashed" else event.detail


def run_inline(
    config: RunConfig, run_dir: Path, cells: Sequence[Cell], workers: int, on_event: Callable[[Event], None]
) -> dict[str, str]:
    """What `run_cells` does, by the worker's own loop, in this process."""
    connection = Inline(list(cells), on_event)
    serve(connection, config, run_dir)  # type: ignore[arg-type]
    return connection.ends


@dataclass
class Bench:
    """A place for a test's runs.

    Attributes:
        folder: Below it are all files.
        plugins: The test's own copy of the plug-ins.
        ran: Cells that the last run trained, evaluated or scored, in order.
    """

    folder: Path
    plugins: Path
    ran: list[str] = field(default_factory=list)

    def reward(self, name: str) -> str:
        """A reward of the plug-ins as it is named on the command line."""
        return f"{self.plugins}:{name}"

    def run(self, out: str = "run", **changes: Any) -> Path:
        """Run a benchmark as the command line does; its directory."""
        self.ran = []
        passed = settings(self.plugins, self.folder / out, **changes)
        return benchmark.run_benchmark(resolve(passed), passed, self._note)

    def _note(self, event: Event) -> None:
        if event.ends:
            self.ran.append(event.cell)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs whose cells are carried out in this process and which render no report."""
    monkeypatch.setattr(benchmark, "run_cells", run_inline)
    monkeypatch.setattr("harness.report.build.build_report", lambda run_dir, out=None: run_dir)
    return Bench(tmp_path, plugin_file(tmp_path / "plugins"))


def scores(cell: Path) -> pd.DataFrame:
    """A cell's scores without the clock's column."""
    return pd.read_parquet(cell / "scores.parquet").drop(columns="train_seconds")


def updates(cell: Path) -> list[dict[str, Any]]:
    """A cell's log of iterations, without clocks and memory."""
    lines = (cell / "updates.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def outcome(cell: Path) -> dict[str, Any]:
    """How a cell ended, without clocks and memory."""
    status: Mapping[str, Any] = store.read_json(cell / "status.json")
    kept = ("state", "reason", "iterations", "cost", "training_hash", "evaluation_hash", "evaluation_rewards")
    return {key: status.get(key) for key in kept}


def assert_same_cell(cell: Path, other: Path) -> None:
    """Both directories hold the same records, pictures and adapter, bit by bit."""
    assert outcome(cell) == outcome(other)
    assert store.read_json(cell / "identity.json") == store.read_json(other / "identity.json")
    pd.testing.assert_frame_equal(scores(cell), scores(other), check_exact=True)
    metrics = [pd.read_parquet(path / "metrics.parquet") for path in (cell, other)]
    pd.testing.assert_frame_equal(*metrics, check_exact=True)
    if (other / "updates.jsonl").exists():
        assert updates(cell) == updates(other)
    for kind in ("*.png", "*.safetensors"):
        files = {path.relative_to(other): path.read_bytes() for path in other.rglob(kind)}
        assert files or kind == "*.safetensors", f"{other} holds no {kind}"
        assert files == {path.relative_to(cell): path.read_bytes() for path in cell.rglob(kind)}


def assert_same_run(run: Path, other: Path) -> None:
    """Both runs hold the same cells with the same records."""
    cells = sorted(path.name for path in (other / "cells").iterdir())
    assert cells == sorted(path.name for path in (run / "cells").iterdir())
    for cell in cells:
        assert_same_cell(run / "cells" / cell, other / "cells" / cell)
