"""`mix`: adapters trained on several rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands._arguments import require_run


def mix(
    directory: Annotated[Path, typer.Argument(help="Directory of a run that trained on the rewards to mix.")],
    weights: Annotated[str, typer.Option(help="Weight of each reward's adapter: emoji-3d=0.5,emoji-clip=0.5")],
    arm: Annotated[
        str | None, typer.Option(help="Whose adapters; default: the only trained arm, else the reference.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the mixed adapter; default: the run's.", min=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Mix adapters that a run trained on several rewards into one adapter, and score it.

    After  run --methods draft-k --rewards emoji-3d,emoji-clip:

    python -m harness mix results/RUN --weights emoji-3d=0.5,emoji-clip=0.5

    Mixed is the weighted sum of the products B A, seed by seed; at a rank below the sum of the adapters' ranks it is
    the nearest adapter, and how far it is off is the error shown. Any finite weights do: one alone scales an adapter.
    Writes DIRECTORY/mixes/<arm>--<weights>--rank<r>/: an adapter for each seed, which load_lora_weights of diffusers
    reads, and scores on the run's held-out prompts. The same command again does only what is missing.
    See docs/mixing.md.
    """
    from harness.config import MixConfig

    require_run(directory)

    from harness import mixing, store
    from harness.benchmark import plan
    from harness.report.mixes import summary

    stored = store.read_json(directory / "run.json")
    wanted = MixConfig(arm=mixing.pick_arm(stored, arm), weights=mixing.parse_weights(weights), rank=rank)
    chosen = mixing.resolve_mix(wanted, stored)
    with store.lock(directory):
        job = plan(mixing.config_of(stored, directory, device))
        made = mixing.make_mix(job.grid, directory, chosen, typer.echo)
    typer.echo()
    for line in summary(directory, made.name):
        typer.echo(line)
