"""What is new in the records of a cell that is being worked on, as rows of named metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from harness.cost import Cost

COSTS = {"seconds", "memory_mib", *(field.name for field in fields(Cost))}
Row = tuple[int, dict[str, float]]


class CellStream:
    """Reads `updates.jsonl` and the scores of curve points as they grow.

    Names: `train/<metric>` and `cost/<count>` of every iteration, and `eval/<reward>/<split>`, the mean score over
    prompts of the mean over latents, where the model was evaluated.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._place = 0  # bytes of the log that were read
        self._iteration = 0
        self._seen: set[str] = set()
        self._given: set[tuple[int, str]] = set()  # (iteration, name) of scores
        self._early: list[Row] = []

    def new(self) -> list[Row]:
        """(iteration, metrics) of what came since the last call, iterations never falling, also between calls."""
        # In this order: when a line is there, the points of all iterations before it are. Points that belong to lines
        # written in between wait for those.
        lines = list(self._lines())
        rows = sorted([*lines, *self._early, *self._points()], key=lambda row: row[0])
        self._early = [row for row in rows if row[0] > self._iteration]
        return [row for row in rows if row[0] <= self._iteration]

    def _lines(self) -> Iterator[Row]:
        path = self._directory / "updates.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._place)
            whole = file.read().rpartition(b"\n")[0]  # what is behind the last newline is still being written
        self._place += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            content: dict[str, Any] = json.loads(line)
            self._iteration = int(content.pop("iteration"))
            numbers = {name: float(value) for name, value in content.items() if isinstance(value, (int, float))}
            yield self._iteration, {_named(name): value for name, value in numbers.items()}

    def _points(self) -> Iterator[Row]:
        for table in self._tables():
            default = table[table["variant"] == "default"]
            for point, rows in default.groupby("point", sort=False):
                if str(point) not in self._seen:
                    self._seen.add(str(point))
                    iteration = int(rows["iteration"].iloc[0])
                    # The last curve point may be at the end already, where the final scores come, too.
                    means = {name: mean for name, mean in _means(rows).items() if (iteration, name) not in self._given}
                    self._given |= {(iteration, name) for name in means}
                    yield iteration, means

    def _tables(self) -> list[pd.DataFrame]:
        """Scores so far: of all points once the cell has ended, before that one file for each."""
        try:
            paths = sorted((self._directory / "points").glob("*.parquet"), key=lambda path: float(path.stem))
            found = [pd.read_parquet(path) for path in paths if path.stem not in self._seen]
        except FileNotFoundError:  # the cell ended just now
            found = []
        whole = self._directory / "scores.parquet"
        return [pd.read_parquet(whole)] if whole.exists() else found


def _named(metric: str) -> str:
    return f"{'cost' if metric in COSTS else 'train'}/{metric}"


def _means(rows: pd.DataFrame) -> dict[str, float]:
    """Of each reward and split: over prompts, of the mean over latents."""
    by_prompt = rows.groupby(["reward", "split", "prompt_id"])["score"].mean()
    means = by_prompt.groupby(["reward", "split"]).mean().reset_index()
    names = "eval/" + means["reward"].astype(str) + "/" + means["split"].astype(str)
    return dict(zip(names.tolist(), means["score"].astype(float).tolist(), strict=True))
