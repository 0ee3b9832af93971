"""`report`: from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands._arguments import report_lines, require_run


def report(
    directories: Annotated[list[Path], typer.Argument(help="Directory of a run, finished or not; or several.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; default: DIRECTORY/report, of several runs beside the first: A-vs-B."),
    ] = None,
) -> None:
    """Write the report of a run, or of several side by side, from their records alone (needs no torch).

    python -m harness report results/RUN

    python -m harness report results/RUN results/OTHER --out results/both

    It is report.md and, with the same content, report.html, with every figure and table as files. An older report
    there is replaced, other files beside it stay, and a directory that has files and no report is refused.
    """
    for directory in directories:
        require_run(directory)
    if len(directories) == 1:
        from harness.report.build import build_report

        typer.echo(report_lines(build_report(directories[0], out)))
        return
    from harness.report.side_by_side import build_side_by_side

    typer.echo(report_lines(build_side_by_side(directories, out or _beside(directories))))


def _beside(directories: list[Path]) -> Path:
    """A directory beside the first run: a report of several belongs to none of them."""
    names = [directory.resolve().name for directory in directories]
    rest = names[1] if len(names) == 2 else f"{len(names) - 1}-others"
    return directories[0].resolve().with_name(f"{names[0]}-vs-{rest}")
