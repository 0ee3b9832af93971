"""`compare`: has a method become worse than a baseline?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.commands._arguments import BASELINES, require_run, words
from harness.errors import Regressed, Undecided, UserError, nearest

if TYPE_CHECKING:
    from harness.regression.snapshot import Snapshot


def compare(
    new: Annotated[Path, typer.Argument(help="Directory of the new run.")],
    baseline: Annotated[str, typer.Argument(help="A baseline's name or file, or the directory of another run.")],
    margin: Annotated[float, typer.Option(help="Largest acceptable loss, in base SD.")] = 0.1,
    rewards: Annotated[
        str, typer.Option(help="Evaluation rewards that decide besides the one trained on; all: every one.")
    ] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit code 2 where something is inconclusive or missing.")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write a comment for a pull request here.")] = None,
) -> None:
    """Compare a run with a baseline: identical, equal up to rounding, or a non-inferiority test over training seeds.

    python -m harness compare results/RUN NAME --margin 0.1

    Exit code 1: something is WORSE, a loss larger than the margin. 2: the two cannot be compared, or with --strict
    something is inconclusive or missing. 0: everything else. Costs are shown, and flagged where they grew by a tenth
    beyond their noise, and never change the exit code. Writes comparison.json into the new run, which its next report
    shows. See docs/ci.md.
    """
    require_run(new)

    from harness.regression import comparing, showing
    from harness.regression.snapshot import take
    from harness.store import write_bytes, write_json

    compared = comparing.compare(take(new), _baseline(baseline), margin, words(rewards))
    for line in showing.terminal(compared):
        typer.echo(line)
    try:
        write_json(new / "comparison.json", comparing.record(compared))
        if markdown:
            write_bytes(markdown, showing.markdown(compared).encode())
    except OSError as error:  # which must not look like a loss
        raise UserError(f"the comparison could not be written: {error.strerror}: {error.filename}") from None
    if compared.outcome == "WORSE":
        raise Regressed(showing.headline(compared))
    if strict and compared.undecided:
        raise Undecided("--strict: something is inconclusive or was not compared; see above")


def _baseline(named: str) -> Snapshot:
    """From a run directory, a file, or a name below results/baselines.

    Raises:
        UserError: There is no such baseline.
    """
    from harness.regression.snapshot import read, take

    path = Path(named)
    if path.is_dir():
        require_run(path)
        return take(path)
    if path.is_file():
        return read(path)
    if (pinned := BASELINES / f"{named}.json").is_file():
        return read(pinned)
    known = sorted(file.stem for file in BASELINES.glob("*.json"))
    raise UserError(f"there is no baseline {named!r}: no file, no run, nothing in {BASELINES}; {nearest(named, known)}")
