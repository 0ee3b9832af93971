"""`plan`: how many seeds and prompts a question needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands._arguments import require_run


def plan(
    from_: Annotated[Path, typer.Option("--from", help="Directory of an earlier run, whose variances are used.")],
    detect: Annotated[float, typer.Option(help="Difference to be found, in units of the base SD.")],
) -> None:
    """Say how many seeds, prompts and latents it takes to find a difference, and what they cost (needs no torch).

    python -m harness plan --from results/RUN --detect 0.2

    The variances are those of an earlier run of the same kind; see docs/statistics.md.
    """
    require_run(from_)
    from harness.report.plan_text import describe
    from harness.report.planning import plan as planned
    from harness.report.records import load_run

    typer.echo(describe(planned(load_run(from_), detect)))
