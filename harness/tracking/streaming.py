"""Hands the records of a run on to its trackers while cells are worked on."""

from __future__ import annotations

import importlib.util
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import store
from harness.errors import UserError
from harness.executors.local import Event
from harness.tracking.cell_stream import CellStream
from harness.tracking.tensorboard import TensorBoard
from harness.tracking.tracker import Tracker
from harness.tracking.weights_and_biases import WeightsAndBiases, log_in

TRACKERS: Mapping[str, Callable[[Path], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
PATIENCE_SECONDS = 120.0


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that cannot work here, before anything is spent.

    Raises:
        UserError: A package is missing, or nobody is logged in; says what to do.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name} needs a package that is missing: pip install 'draft-bench[{name}]'")
        if name == "wandb":
            log_in()


class Streaming:
    """A thread that reads the cells' records and feeds trackers; training waits for it nowhere.

    A tracker that fails is left out from then on, with one warning; the records lose nothing.

    Args:
        run_dir: The run; `run.json` must be there when it is entered.
        names: Trackers by name.
        ended: Cells that ended earlier; those that a tracker does not hold yet are given to it.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], ended: Sequence[str]) -> None:
        self._run_dir = run_dir
        self._trackers = {name: TRACKERS[name](run_dir) for name in names}
        self._ended = ended
        self._streams: dict[str, CellStream] = {}
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)

    def __enter__(self) -> Streaming:
        self._plan = store.read_json(self._run_dir / "run.json")
        if self._trackers:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.put(None)
        if self._trackers:
            self._thread.join(PATIENCE_SECONDS if kind is None else PATIENCE_SECONDS / 10)
            if self._thread.is_alive():
                self._warn(f"{', '.join(self._trackers)} did not finish in time; the records are complete")

    def event(self, event: Event) -> None:
        """Note that a cell has got further."""
        if self._thread.is_alive() and event.phase != "load":  # its log is cut back to the checkpoint after that
            self._events.put(event)

    def _work(self) -> None:
        for cell in self._ended:
            state = store.read_json(self._run_dir / "cells" / cell / "status.json").get("state", "")
            lacking = {name: tracker for name, tracker in self._trackers.items() if not tracker.holds(cell)}
            self._feed(Event("finished", cell, detail=state), lacking)
        while (event := self._events.get()) is not None:
            self._feed(event, self._trackers)
        for cell in list(self._streams):
            self._feed(Event("interrupted", cell, detail="interrupted"), self._trackers)

    def _feed(self, event: Event, trackers: Mapping[str, Tracker]) -> None:
        """Hand on what is new of a cell; a cell that is not known yet is begun."""
        begun = event.cell in self._streams
        stream = self._streams.setdefault(event.cell, CellStream(self._run_dir / "cells" / event.cell))
        last = event.kind not in ("progress", "warning")
        rows = self._read(stream)
        for name, tracker in list(trackers.items()):
            try:
                if not begun:
                    tracker.begin(event.cell, self._config(event.cell))
                for step, metrics in rows:
                    tracker.log(event.cell, step, metrics)
                if last:
                    tracker.end(event.cell, "crashed" if event.kind == "crashed" else event.detail)
            except Exception as error:  # whatever it is, training must not end for it
                self._trackers.pop(name, None)
                self._warn(f"{name} is left out from here on: {type(error).__name__}: {error}")
        if last:
            del self._streams[event.cell]

    def _read(self, stream: CellStream) -> list[tuple[int, dict[str, float]]]:
        try:
            return stream.new()
        except Exception as error:
            self._trackers.clear()
            self._warn(f"trackers are left out from here on: {type(error).__name__}: {error}")
            return []

    def _config(self, cell: str) -> dict[str, Any]:
        """What a cell is, from the plan."""
        entry = next(found for found in self._plan["cells"] if found["cell"] == cell)
        arm: dict[str, Any] = next((a for a in self._plan["arms"] if a["label"] == entry["arm"]), {})
        return {
            "run": self._plan["name"],
            "arm": entry["arm"],
            "training_reward": entry["reward"],
            "seed": entry["seed"],
            "training_hash": entry["training_hash"],
            **{key: arm[key] for key in ("method", "version", "config", "sampler") if key in arm},
            **{key: self._plan[key] for key in ("model", "suite", "budget")},
        }

    def _warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)
        line = {"time": store.utc_now(), "event": "tracker failed", "cell": "", "detail": text}
        store.append_line(self._run_dir / "log.jsonl", line)
