"""Worker processes on one machine: persistent, one thread each on a CPU, gone when their parent is gone."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.config import RunConfig
    from harness.grid import Cell

# glibc gives freed memory back to the kernel at once by default, and training pays for the page faults.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
    "MALLOC_TOP_PAD_": str(2**28),
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",  # its remarks on image processors that nothing here uses
}


@dataclass(frozen=True)
class Event:
    """What a worker says about a cell.

    `progress`, `warning` (of over-optimisation, with its numbers), `finished` (detail is the state) or `crashed`
    (detail: why); the last two end it.
    """

    kind: str
    cell: str
    phase: str = ""
    fraction: float = 0.0
    detail: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ends(self) -> bool:
        """Whether the cell has ended with it."""
        return self.kind in ("finished", "crashed")


class _Worker:
    def __init__(self, config: RunConfig, run_dir: Path, device: str) -> None:
        context = mp.get_context("spawn")
        self.connection, child = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=work, args=(child, config.model_copy(update={"device": device}), run_dir), daemon=True
        )
        self.process.start()
        child.close()
        self.cell: Cell | None = None

    def give(self, cell: Cell) -> None:
        self.cell = cell
        with suppress(BrokenPipeError):  # it died since its last cell: the end of the pipe will say so
            self.connection.send(cell)


def run_cells(
    config: RunConfig, run_dir: Path, cells: Sequence[Cell], workers: int, on_event: Callable[[Event], None]
) -> dict[str, str]:
    """Run cells in order on `workers` processes.

    A worker that dies takes only its cell with it: the cell is reported as crashed and a new worker takes over.

    Returns:
        The end of each cell: `completed`, `diverged` or `crashed`.
    """
    waiting = list(reversed(cells))
    ends: dict[str, str] = {}
    devices = _devices(config, min(workers, len(cells)))
    with _environment(), _ending([_Worker(config, run_dir, device) for device in devices]) as pool:
        for worker in pool:
            if waiting:
                worker.give(waiting.pop())
        while any(worker.cell for worker in pool):
            busy: list[Connection] = [worker.connection for worker in pool if worker.cell]
            for ready in wait(busy):
                worker = next(w for w in pool if w.connection is ready)
                assert worker.cell is not None
                try:
                    event: Event = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    code = worker.process.exitcode
                    event = Event("crashed", worker.cell.cell, detail=f"its process ended with code {code}")
                    if waiting:
                        place = pool.index(worker)
                        pool[place] = worker = _Worker(config, run_dir, devices[place])
                on_event(event)
                if event.ends:
                    ends[event.cell] = "crashed" if event.kind == "crashed" else event.detail
                    worker.cell = None
                    if waiting:
                        worker.give(waiting.pop())
    return ends


def _devices(config: RunConfig, workers: int) -> list[str]:
    if config.device != "auto":
        return [config.device] * workers
    import torch

    if not torch.cuda.is_available():
        return ["cpu"] * workers
    return [f"cuda:{i % torch.cuda.device_count()}" for i in range(workers)]


def default_workers(config: RunConfig) -> int:
    """One per GPU, or one per usable core."""
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        return len(os.sched_getaffinity(0))
    return 1 if config.device.startswith("cuda") else torch.cuda.device_count()


@contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _ending(pool: list[_Worker]) -> Iterator[list[_Worker]]:
    try:
        yield pool
    finally:
        for worker in pool:
            worker.connection.close()  # an idle worker reads the end of its pipe and returns
            if worker.cell is not None:
                worker.process.terminate()
        for worker in pool:
            worker.process.join(timeout=10)


def work(connection: Connection, config: RunConfig, run_dir: Path) -> None:
    """A worker's life: nobody's orphan, deaf to Ctrl-C, serving the pipe from its parent."""
    _die_with_parent()
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    serve(connection, config, run_dir)


def serve(connection: Connection, config: RunConfig, run_dir: Path) -> None:
    """Run the cells that a connection gives, and answer with events, until it ends."""
    workshop: Any = None
    while True:
        try:
            cell: Cell = connection.recv()
        except EOFError:
            return
        try:
            import torch

            from harness.cell import run_cell
            from harness.grid import Grid
            from harness.workshop import Workshop

            if workshop is None:
                torch.set_num_threads(1 if config.device == "cpu" else torch.get_num_threads())
                connection.send(Event("progress", cell.cell, "load", 0.0, "loading the model"))
                workshop = Workshop(Grid(config))
            if cell not in workshop.grid.cells:
                raise UserError("model, suite, weights or code changed while the run was going; start it again")

            def report(phase: str, fraction: float, detail: str, name: str = cell.cell) -> None:
                connection.send(Event("progress", name, phase, fraction, detail))

            def warn(warning: Mapping[str, Any], name: str = cell.cell) -> None:
                numbers = {key: value for key, value in warning.items() if key != "detail"}
                connection.send(Event("warning", name, detail=str(warning["detail"]), numbers=numbers))

            connection.send(Event("finished", cell.cell, detail=run_cell(workshop, cell, run_dir, report, warn)))
        except Exception as error:
            # A fault of one cell must not stop the others; its traceback goes to the cell's own log.
            directory = run_dir / "cells" / cell.cell
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            connection.send(Event("crashed", cell.cell, detail=reason))


def _die_with_parent() -> None:
    """End this process as soon as its parent is gone, whatever it is doing (also after `kill -9` of the parent)."""
    parent = mp.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
