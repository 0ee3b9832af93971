"""Where a report is written: an older one gives way as a whole, and nothing else is ever removed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import UserError

REPORT = "report.md"
OURS = re.compile(r"report\.(md|html)|fig-\d+-.+\.(csv|png|svg)|table-.+\.csv|run-\d+")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder whose files take the place of an older report's once all are written; on an error nothing does.

    Other files beside an older report stay where they are.

    Raises:
        UserError: if `target` is no folder, or one that has files and no report.
    """
    place = target.resolve()  # `.` has no name of its own
    _check(place, target)
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(place: Path, shown: Path) -> None:
    """Whether a report may be written there; asked before anything is drawn."""
    if not place.exists() and not place.is_symlink():
        return
    if not place.is_dir():
        raise UserError(f"{shown} is a file: say in which directory the report belongs with --out DIRECTORY")
    older = (place / REPORT).is_file() and any(place.glob("table-*.csv"))
    if not older and any(place.iterdir()):
        raise UserError(f"{shown} has files and no report: say a new or empty directory with --out DIRECTORY")


def _replace(partial: Path, place: Path) -> None:
    """Put the new files there, then take away what else an older report wrote."""
    place.mkdir(exist_ok=True)
    written = {entry.name for entry in partial.iterdir()}
    for name in sorted(written):
        if (place / name).is_dir():
            shutil.rmtree(place / name)
        (partial / name).replace(place / name)
    for entry in [*place.iterdir()]:
        if entry.name in written or not OURS.fullmatch(entry.name):
            continue
        if entry.is_file() or entry.is_symlink():
            entry.unlink()
        elif (entry / REPORT).is_file():  # of a run among several
            shutil.rmtree(entry)
