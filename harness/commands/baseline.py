"""`baseline save`: pin a run, so that later ones can be compared with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from harness.commands._arguments import BASELINES, require_run
from harness.errors import UserError

baseline = typer.Typer(no_args_is_help=True, help="Pin runs that later ones are compared with.")


@baseline.callback()
def _group() -> None:
    """Keep `save` a word of its own."""


@baseline.command()
def save(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    name: Annotated[str, typer.Argument(help="Name of the baseline.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a baseline of this name.")] = False,
) -> None:
    """Pin a finished run in results/baselines/NAME.json, a small file to be committed.

    Later:  python -m harness compare NEW_RUN NAME

    It holds what a comparison needs and nothing else: identities, versions, each seed's gains, scores of single
    pictures where they are few, costs. See docs/ci.md.
    """
    require_run(run)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"{name!r} is no name for a file: take letters, digits, '-', '_' and '.'")
    path = BASELINES / f"{name}.json"

    from harness.regression.snapshot import take, text_of
    from harness.store import write_bytes

    snapshot = take(run, name)
    if snapshot.missing:
        shown = ", ".join(snapshot.missing[:6]) + (", ..." if len(snapshot.missing) > 6 else "")
        raise UserError(
            f"{run} is not finished: {len(snapshot.missing)} cells are missing ({shown}); the command that made it "
            "runs what is missing"
        )
    text = text_of(snapshot)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        typer.echo(f"{path} is this run already")
        return
    if path.exists() and not force:
        raise UserError(f"{path} is another baseline; take another name, or --force to replace it")
    write_bytes(path, text.encode())
    typer.echo(f"Baseline: {path} ({len(text.encode()) / 1024:.0f} kB, {len(snapshot.cells)} cells)")
