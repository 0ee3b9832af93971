"""`check`: the contracts of a method."""

from __future__ import annotations

from typing import Annotated

import typer

from harness.commands._arguments import words
from harness.errors import ContractsBroken


def check(
    method: Annotated[str, typer.Argument(help="A method's name, or path/to/file.py:Class.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="The method's own settings, e.g. k=2; repeatable.")
    ] = None,
    only: Annotated[str, typer.Option(help="Comma-separated contracts, by the names in the table.")] = "",
) -> None:
    """Check the contracts of a method on tiny models, in under a minute: what passed, what failed, why, what to do.

    Write path/to/file.py, then:  python -m harness check path/to/file.py:MyTuner

    Settings called batch_size, rollout_size ... are made small (harness/contracts/lab.py lists them); shrink others
    with --set. The chain has four steps. The exit code is 1 if a contract fails. See docs/adding-a-method.md.
    """
    from harness.config import parse_set_of_method

    overrides = parse_set_of_method(set_ or [])
    typer.echo(f"checking {method} on two tiny models in double precision; the first line takes a few seconds")

    from harness.contracts import check as contracts
    from harness.contracts.lab import subject

    checked = subject(method, overrides)
    small = {name: value for name, value in checked.settings.items() if name != "optimizer"}
    typer.echo("settings: " + ", ".join([*(f"{k}={v}" for k, v in small.items()), "the rest at their defaults"]) + "\n")
    outcomes = []
    for outcome in contracts.check(checked, words(only)):
        outcomes.append(outcome)
        for line in contracts.lines(outcome):
            typer.echo(line)
    typer.echo(f"\n{method}: {contracts.summary(outcomes)}")
    failed = [outcome.contract.name for outcome in outcomes if outcome.state == "FAILED"]
    if failed:
        raise ContractsBroken(f"{', '.join(failed)}; again with: python -m harness check {method} --only {failed[0]}")
