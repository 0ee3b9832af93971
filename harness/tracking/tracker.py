"""What a tracker is to the harness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Tracker(ABC):
    """A place where the metrics of cells are shown; always called from one thread."""

    @abstractmethod
    def holds(self, cell: str) -> bool:
        """Whether it was given this cell before, by this command or an earlier one."""

    @abstractmethod
    def begin(self, cell: str, config: Mapping[str, Any]) -> None:
        """Start a cell; its whole history follows, in place of what an earlier attempt left."""

    @abstractmethod
    def log(self, cell: str, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a cell that was begun; steps never fall, and one step may come in several parts."""

    @abstractmethod
    def end(self, cell: str, state: str) -> None:
        """Nothing follows: the cell is `completed`, `diverged`, `crashed` or `interrupted`."""
