"""TensorBoard: a log directory for each cell, below `<run>/tensorboard`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.tracking.tracker import Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Tracker):
    """Event files, written anew when a cell is begun, so that no step is there twice."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}

    def holds(self, cell: str) -> bool:
        """Whether there is a directory of its name."""
        return (self._folder / cell).is_dir()

    def begin(self, cell: str, config: Mapping[str, Any]) -> None:
        """Replace the cell's directory; the configuration is a text of step 0."""
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(self._folder / cell, ignore_errors=True)
        self._writers[cell] = SummaryWriter(str(self._folder / cell))
        text = "```json\n" + json.dumps(config, indent=2, ensure_ascii=False) + "\n```"
        self._writers[cell].add_text("config", text, 0)

    def log(self, cell: str, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar for each metric, visible at once."""
        writer = self._writers[cell]
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def end(self, cell: str, state: str) -> None:
        """Close the file."""
        self._writers.pop(cell).close()
