"""`status`: how far a run is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands._arguments import require_run


def status(directory: Annotated[Path, typer.Argument(help="Directory of a run.")]) -> None:
    """Show how far a run is: a line per cell.

    python -m harness status results/RUN
    """
    from harness.progress import status_lines

    require_run(directory)
    for line in status_lines(directory):
        typer.echo(line)
