"""`report`: from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands._arguments import report_lines, require_run


def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a run, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default: DIRECTORY/report.")] = None,
) -> None:
    """Render the report of a run from its records alone (needs no torch)."""
    require_run(directory)
    from harness.report.build import build_report

    typer.echo(report_lines(build_report(directory, out)))
