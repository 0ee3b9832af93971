"""Tables of simulations in a page of the documentation, between markers that name them."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

NUMBER = re.compile(r"\d+(?:\.(\d+))?|\.(\d+)")


@dataclass(frozen=True)
class Table:
    """A table of text with a line below it that says how many repetitions it rests on."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str

    def __str__(self) -> str:
        """Markdown."""
        assert all(len(row) == len(self.columns) for row in self.rows)
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + f"\n\n{self.note}"


@dataclass(frozen=True)
class Page:
    """A markdown file with places for tables."""

    path: Path

    def check(self, name: str, table: Table) -> None:
        """Fail unless the page shows this table, numbers up to two units of their last digit."""
        shown = _place(name).search(self.path.read_text(encoding="utf-8"))
        difference = _difference(shown["table"] if shown else "", str(table))
        if difference:
            pytest.fail(
                f"{self.path.name}, table {name}: {difference}. If the new numbers are right, "
                f"`tox -e calibration -- --write-tables` writes them. The table now:\n{table}"
            )

    def write(self, name: str, table: Table) -> None:
        """Put the table between its markers; tests in other processes may write at the same time."""
        with self.path.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            text, found = _place(name).subn(lambda place: f"{place['open']}\n{table}\n{place['close']}", file.read())
            if not found:
                pytest.fail(f"{self.path.name} has no place for it: <!-- calibration: {name} --> <!-- /calibration -->")
            file.seek(0)
            file.truncate()
            file.write(text)


def _place(name: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?P<open><!-- calibration: {re.escape(name)} -->)\n(?P<table>.*?)\n?(?P<close><!-- /calibration -->)", re.S
    )


def _difference(shown: str, now: str) -> str:
    """The first line that differs by more than rounding; empty where there is none."""
    old, new = shown.strip().splitlines(), now.strip().splitlines()
    if len(old) != len(new):
        return f"{len(old)} lines on the page, {len(new)} now"
    for before, after in zip(old, new, strict=True):
        words = NUMBER.sub("#", before) == NUMBER.sub("#", after)
        pairs = zip(NUMBER.finditer(before), NUMBER.finditer(after), strict=False)
        if not words or any(_differ(x, y) for x, y in pairs):
            return f"the page has {before!r}, now {after!r}"
    return ""


def _differ(before: re.Match[str], after: re.Match[str]) -> bool:
    digits = max(len(m[1] or m[2] or "") for m in (before, after))
    if digits == 0:  # counts and names
        return before[0] != after[0]
    return abs(float(before[0]) - float(after[0])) > 2.1 * 10**-digits
