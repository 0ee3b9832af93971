"""`report`: from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands._arguments import report_lines, require_run
from harness.errors import UserError


def report(
    directories: Annotated[list[Path], typer.Argument(help="Directory of a run, finished or not; of several runs.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default for one run: DIRECTORY/report.")] = None,
) -> None:
    """Render the report of a run, or of several side by side, from their records alone (needs no torch)."""
    for directory in directories:
        require_run(directory)
    if len(directories) == 1:
        from harness.report.build import build_report

        typer.echo(report_lines(build_report(directories[0], out)))
        return
    if out is None:
        raise UserError("a report of several runs belongs to none of them: say where to write it with --out DIRECTORY")
    from harness.report.side_by_side import build_side_by_side

    typer.echo(f"Report: {build_side_by_side(directories, out)}")
