"""What a person sees while cells run: bars with an ETA on a terminal, one line per event elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from harness import store

if TYPE_CHECKING:
    from harness.benchmark import Job
    from harness.executors.local import Event


class Display:
    """Shows the events of a run; a context manager."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=Console(),
            disable=not self._terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._fractions: dict[str, float] = {}
        self._total = 0
        self._all: TaskID | None = None
        self._printed = 0.0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, job: Job) -> None:
        """Say what is about to run."""
        self._total = len(job.pending)
        self._begin = time.monotonic()
        done = len(job.grid.cells) - len(job.pending)
        kept = f", {done} done before" if done else ""
        self._say(f"{job.run_dir}: {len(job.pending)} cells to run{kept}, {job.workers} worker(s)")
        self._all = self._progress.add_task("all cells", total=max(1, self._total), left="", detail="")

    def event(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "warning":
            self._say(f"WARNING {event.cell}: {event.detail}")
            return
        now = time.monotonic()
        if event.cell not in self._started:
            self._started[event.cell] = now
            self._tasks[event.cell] = self._progress.add_task(event.cell, total=1.0, left="", detail="")
        task = self._tasks[event.cell]
        fraction = event.fraction if event.kind == "progress" else 1.0
        self._fractions[event.cell] = fraction
        left = _remaining(now - self._started[event.cell], fraction)
        self._progress.update(task, completed=fraction, left=left, detail=f"{event.phase} {event.detail}".strip())
        done = sum(self._fractions.values())
        overall = _remaining(now - self._begin, done / max(1, self._total))
        if self._all is not None:
            self._progress.update(self._all, completed=done, left=overall)
        if event.ends:
            self._progress.remove_task(task)
            seconds = now - self._started[event.cell]
            finished = sum(1 for value in self._fractions.values() if value >= 1.0)
            end = f"CRASHED: {event.detail}" if event.kind == "crashed" else event.detail
            self._say(f"[{finished}/{self._total}] {event.cell} {end} after {seconds:.0f} s; {overall}".rstrip("; "))
        elif not self._terminal and now - self._printed > 30:
            self._printed = now
            self._say(f"{done:.1f} of {self._total} cells; {overall}".rstrip("; "))

    def _say(self, line: str) -> None:
        if self._terminal:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)


def _remaining(elapsed: float, fraction: float) -> str:
    if fraction < 0.02:
        return ""
    seconds = elapsed * (1 - fraction) / fraction
    return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"


def _warnings(log: Path) -> dict[str, list[str]]:
    """The over-optimisation that was seen in each cell, the first point of each witness."""
    found: dict[str, dict[str, str]] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        event = _object(line)
        if event.get("event") == "warning":  # again where a point was evaluated again, after an interruption
            found.setdefault(event["cell"], {}).setdefault(event["witness"], event["detail"])
    return {cell: list(by_witness.values()) for cell, by_witness in found.items()}


def _object(line: str) -> dict[str, Any]:
    """A line of the log; nothing where the process was killed in writing it."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return found


def status_lines(directory: Path) -> Iterator[str]:
    """A line per cell of a run: its state, iterations and reason."""
    cells = [cell["cell"] for cell in store.read_json(directory / "run.json")["cells"]]
    states = {cell: store.read_json(directory / "cells" / cell / "status.json") for cell in cells}
    width = max(len(cell) for cell in cells)
    warned = _warnings(directory / "log.jsonl")
    for cell, status in states.items():
        updates = directory / "cells" / cell / "updates.jsonl"
        begun = len(updates.read_bytes().splitlines()) if updates.exists() else 0
        state = status.get("state") or ("started" if begun else "waiting")
        reason = f"  {status['reason']}" if status.get("reason") else ""
        kept = status.get("kept")
        reason += f"  best by {kept['reward']}: point {kept['point']}, in {kept['adapter']}/" if kept else ""
        untrained = status.get("kind") in ("base", "inference", "given")
        done = f"{'':>5} no training" if untrained else f"{status.get('iterations', begun):>5} iterations"
        yield f"{cell:<{width}}  {state:<9}  {done}{reason}"
        for warning in warned.get(cell, []):
            yield f"{'':<{width}}  WARNING: {warning}"
    ended = sum(1 for status in states.values() if status.get("state") in ("completed", "diverged"))
    yield f"{ended} of {len(cells)} cells done"
