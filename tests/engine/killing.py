"""Kills cells with SIGKILL at each of their writes, resumes them, and prints how many kills there were.

A process of its own: it imports torch once and forks for every attempt, before any of torch's threads exist.
Usage: killing.py FOLDER PLUGINS
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet  # noqa: F401 - loaded here, once, instead of in every forked attempt
import torch
import torch._dynamo

from harness import store
from harness.cell import Workshop, run_cell
from harness.config import resolve
from harness.grid import Cell, Grid
from tests.engine.fakes import assert_same_cell, settings

MOMENTS = ("before", "torn", "after")
Write = Callable[[Path, bytes], None]


def killing(original: Write, fatal: int, moment: str) -> Write:
    """A `store.write_bytes` whose process is killed at its `fatal`-th call."""
    calls = 0

    def write(path: Path, content: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal and moment == "torn":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.{os.getpid()}.tmp").write_bytes(content[: len(content) // 2])
        if calls == fatal and moment != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, content)
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    return write


def attempt(grid: Grid, cell: Cell, run_dir: Path, fatal: int = 0, moment: str = "") -> int:
    """Bring a cell to its end in a forked process: 0, or the negative number of the signal that ended it."""
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        store.write_bytes = killing(store.write_bytes, fatal, moment)
        run_cell(Workshop(grid), cell, run_dir, lambda phase, fraction, detail: None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_every_write(grid: Grid, cell: Cell, folder: Path) -> int:
    """Kill and resume the cell until an attempt has no write left to be killed at; how many kills there were."""
    reference = folder / "reference"
    assert attempt(grid, cell, reference) == 0
    for fatal in itertools.count(1):
        run_dir = folder / f"{cell.arm}-{fatal}"
        ended = attempt(grid, cell, run_dir, fatal, MOMENTS[fatal % len(MOMENTS)])
        assert ended in (0, -signal.SIGKILL)
        if ended:
            assert attempt(grid, cell, run_dir) == 0
        assert_same_cell(run_dir / "cells" / cell.cell, reference / "cells" / cell.cell)
        if not ended:
            return fatal - 1
    raise AssertionError


def main(folder: Path, plugins: Path) -> None:
    """The base, a cell that diverges and one that completes."""
    changes = {
        "rewards": [f"{plugins}:Brightness"],
        "settings": {"draft": {"learning_rate": 0.3}},
        "variants": [{"lora_scale": 0.5}],
        "early_stopping": {"reward": f"{plugins}:Brightness", "prompts": 1, "latents": 1},
        "evaluation": {"prompts": {"training": 1, "held-out": 2}, "diversity_prompts": 1, "diversity_latents": 2},
    }
    grid = Grid(resolve(settings(plugins, folder / "reference", **changes)))
    Workshop(grid)
    told = {}
    for cell in grid.cells:
        kills = kill_at_every_write(grid, cell, folder)
        state = store.read_json(folder / "reference" / "cells" / cell.cell / "status.json")["state"]
        told[cell.arm] = {"kills": kills, "state": state}
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
