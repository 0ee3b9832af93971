"""`score`: pictures from files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands._arguments import words
from harness.errors import UserError


def score(
    pictures: Annotated[list[Path], typer.Argument(help="Files, and folders with all pictures in them.")],
    rewards: Annotated[str, typer.Option(help="E.g. aesthetic,jpeg-bytes; all: those whose weights are at hand.")],
    prompt: Annotated[str | None, typer.Option(help="What all the pictures are of.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Says what each picture is of: .csv, .jsonl or .txt.")] = None,
    reward_weights: Annotated[
        list[str] | None, typer.Option(help="hpsv2.1=path/to/file.pt: a file, a directory or owner/name@revision.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this .csv or .json, too.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Score pictures from files, of any size and mode.

    python -m harness score --rewards jpeg-bytes,aesthetic --prompt "a fox" pictures/ more/fox.png

    Where pictures have different prompts:  --prompts FILE,  a CSV with the columns file,prompt; or lines of JSON,
    {"file": "1.png", "prompt": "a fox", "object": "fox"}, further keys being labels; or a .txt with the prompt of each
    picture in turn. A file is named by as much of the end of its path as tells it apart. See docs/rewards.md.
    """
    if (prompt is None) == (prompts is None):
        raise UserError('say once what the pictures are of: --prompt TEXT ("" if no reward reads it) or --prompts FILE')

    from harness import scoring
    from harness.grid import pick_device
    from harness.pictures import read_pictures
    from harness.reward_sources import find_all, find_reward, parse_weights

    if out:
        scoring.check_out(out)
    found = read_pictures(pictures, prompts or prompt)
    weights, names = parse_weights(reward_weights or []), words(rewards)
    every, left_out = find_all("any", weights) if "all" in names else ({}, {})
    sources = every | {name: find_reward(name, weights) for name in names if name != "all"}
    if not sources:
        raise UserError(f"--rewards {rewards!r} names no reward; see `python -m harness list rewards`")
    for name, reason in left_out.items():
        typer.echo(f"without {name}: {reason}", err=True)
    for source in sources.values():
        source.check()
    scores = scoring.score_pictures(found, sources, pick_device(device))
    for line in scoring.table(found, scores, list(sources)):
        typer.echo(line)
    for name, source in sources.items():
        typer.echo(f"{name}: version {source.version}, {source.reward.unit}")
    if out:
        scoring.write(out, found, scores, sources)
        typer.echo(f"Scores: {out}")
