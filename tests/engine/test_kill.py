"""Real kills: whatever dies and whenever, the same command finishes the run as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from harness import store
from harness.config import resolve
from harness.executors.local import Event, run_cells
from harness.grid import Grid
from tests.engine.fakes import Bench, assert_same_cell, assert_same_run, settings, updates

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until something is so; a loaded machine may take its time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_kill_at_any_write_changes_nothing(bench: Bench) -> None:
    """Killed before, in the middle of or after each of its writes, a cell ends with the records of an undisturbed one.

    The writes are those of training (checkpoints), of evaluation on the way and at the end (pictures, scores,
    metrics, adapter) and of the cell's end (status). A cell that diverged still has diverged when it is resumed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.killing", str(bench.folder), str(bench.plugins)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {arm: cell["state"] for arm, cell in told.items()} == {
        "base": "completed",
        "draft": "diverged",
        "ddpo": "completed",
    }
    assert all(cell["kills"] >= 8 for cell in told.values())


@pytest.mark.slow
def test_a_killed_worker_takes_only_its_cell_with_it(bench: Bench) -> None:
    """A worker that is killed in training crashes its cell; a new worker goes on, and the same command repairs it."""
    config = resolve(settings(bench.plugins, bench.folder / "run"))
    cells = Grid(config).cells
    killed: list[str] = []

    def kill_once(event: Event) -> None:
        if event.phase == "train" and not killed:
            killed.append(event.cell)
            (worker,) = multiprocessing.active_children()
            worker.kill()

    bench.plugins.with_name("slow").touch()
    ends = run_cells(config, bench.folder / "run", cells, 1, kill_once)
    bench.plugins.with_name("slow").unlink()
    assert ends == {cell.cell: "crashed" if [cell.cell] == killed else "completed" for cell in cells}
    assert not multiprocessing.active_children()
    bench.run()
    assert bench.ran == killed
    bench.run("whole")
    assert_same_run(bench.folder / "run", bench.folder / "whole")


@pytest.mark.slow
def test_a_killed_or_interrupted_command_is_resumed(bench: Bench) -> None:
    """The command is killed alone, then stopped by Ctrl-C: no worker outlives it, and the run is finished all the same.

    Ctrl-C is exit code 130 and one line that says what to do.
    """
    reward, out = bench.reward("Quadratic"), bench.folder / "run"
    passed = settings(bench.plugins, out, methods=["draft"])
    (bench.folder / "run.yaml").write_text(json.dumps(passed), encoding="utf-8")
    command = [sys.executable, "-m", "harness", "run", "--config", str(bench.folder / "run.yaml")]
    bench.plugins.with_name("slow").touch()
    name = Grid(resolve(passed)).cells[1].cell
    log = out / "cells" / name / "updates.jsonl"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
        )

    first = start()
    wait_for(lambda: log.exists() and len(updates(log.parent)) >= 2, "training")
    family = psutil.Process(first.pid).children(recursive=True)
    assert family
    first.kill()
    first.communicate()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert len(gone) == len(family)
    assert not (log.parent / "status.json").exists()
    seen = log.stat().st_mtime_ns

    second = start()
    wait_for(lambda: log.stat().st_mtime_ns > seen, "training to go on")
    family = psutil.Process(second.pid).children(recursive=True)
    os.killpg(second.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches every process of the group
    _, stderr = second.communicate(timeout=PATIENCE)
    assert second.returncode == 130
    assert stderr.strip() == "interrupted; the same command resumes the run"
    assert not psutil.wait_procs(family, timeout=30)[1]

    bench.plugins.with_name("slow").unlink()
    bench.run(methods=["draft"], rewards=[reward])
    assert bench.ran == [name]
    assert store.read_json(log.parent / "status.json")["state"] == "completed"
    whole = bench.run("whole", methods=["draft"], rewards=[reward])
    assert_same_cell(log.parent, whole / "cells" / name)
    assert_same_run(out, whole)
