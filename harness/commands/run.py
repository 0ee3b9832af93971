"""`run`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from harness.commands._arguments import report_lines, words


def run(
    methods: Annotated[str, typer.Option(help="Comma-separated names, or path/to/file.py:Class.")] = "",
    arm: Annotated[
        list[str] | None, typer.Option(help="'label: method key=value ...'; repeat for an ablation.")
    ] = None,
    rewards: Annotated[str, typer.Option(help="Training rewards, e.g. emoji-3d,2*emoji-3d+1*emoji-clip.")] = "",
    eval_rewards: Annotated[
        str, typer.Option(help="Score with these, too, or with all: rewards whose weights are at hand.")
    ] = "",
    reward_weights: Annotated[
        list[str] | None, typer.Option(help="hpsv2.1=path/to/file.pt: a file, a directory or owner/name@revision.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="5 means 0..4; 0,3,7 is a list; 10-14 a range.")] = "",
    model: Annotated[str, typer.Option(help="emoji (embedded), a pipeline directory, or a hub id.")] = "",
    revision: Annotated[str, typer.Option(help="Revision of a hub id.")] = "",
    suite: Annotated[str, typer.Option(help="Prompt suite, NAME=PATH of your copy, or a .txt or .jsonl file.")] = "",
    preset: Annotated[str, typer.Option(help="Named settings; see `list presets`.")] = "",
    budget: Annotated[str, typer.Option(help="What a cell may spend: queries=256, iterations=64 ...")] = "",
    reference: Annotated[str, typer.Option(help="Arm that the others are compared with; default: the first.")] = "",
    lora_scale: Annotated[str, typer.Option(help="Evaluate trained adapters at these strengths, too: 0.5,0.75.")] = "",
    lora_steps: Annotated[str, typer.Option(help="... and acting in the last steps only: 3,5.")] = "",
    eval_latents: Annotated[int, typer.Option(help="Pictures per evaluation prompt.", min=0)] = 0,
    keep_best: Annotated[
        str, typer.Option(help="Store the checkpoint that is best by this held-out reward on validation prompts, too.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Directory of the run; default: results/<preset>-<hash>.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; default: one per core or GPU.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "",
    dtype: Annotated[str, typer.Option(help="Frozen weights: float32, bfloat16, float16, float64.")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="draft-k.k=5, sampler.steps=20, adapter.rank=8; repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings.")] = None,
    keep_images: Annotated[str, typer.Option(help="Evaluated pictures: final or none.")] = "",
    track: Annotated[str, typer.Option(help="Stream metrics to tensorboard, wandb or both (docs/trackers.md).")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the grid and its cost; run nothing. Fetches weights.")
    ] = False,
) -> None:
    """Run a grid of (method, reward, seed) cells, or what is missing of it, and write its report."""
    from harness.config import (
        load_yaml,
        merge,
        parse_arm,
        parse_budget,
        parse_seeds,
        parse_set,
        parse_variants,
        resolve,
    )

    passed: dict[str, Any] = load_yaml(config, "configuration") if config else {}
    simple = {
        "model": model, "revision": revision, "suite": suite, "preset": preset, "reference": reference,
        "device": device, "dtype": dtype, "keep_images": keep_images, "workers": workers,
    }  # fmt: skip
    flags: dict[str, Any] = {key: value for key, value in simple.items() if value}
    if eval_rewards:
        flags["evaluation_rewards"] = words(eval_rewards)
    if reward_weights:
        from harness.reward_sources import parse_weights

        flags["reward_weights"] = parse_weights(reward_weights)
    if track:
        flags["trackers"] = words(track)
    if methods:
        flags["methods"] = words(methods)
    if arm:
        flags["arms"] = [vars(parse_arm(text)) for text in arm]
    if rewards:
        flags["rewards"] = words(rewards)
    if seeds:
        flags["seeds"] = parse_seeds(seeds)
    if budget:
        flags["budget"] = parse_budget(budget)
    if eval_latents:
        flags["evaluation"] = {"latents": eval_latents}
    if lora_scale or lora_steps:
        flags["variants"] = parse_variants(lora_scale, lora_steps)
    if keep_best:
        flags["early_stopping"] = {"reward": keep_best}
    if out:
        flags["out"] = str(out)
    passed = merge(merge(passed, flags), parse_set(set_ or []))
    resolved = resolve(passed)
    if keep_best:
        from harness.early_stopping import refuse_trained

        refuse_trained(keep_best, resolved.rewards)

    from harness.benchmark import plan, run_benchmark

    if dry_run:
        from harness.estimate import describe_cost

        typer.echo(describe_cost(plan(resolved)))
        return
    from harness.progress import Display

    with Display() as display:
        directory = run_benchmark(resolved, passed, display.event, display.start)
    if resolved.early_stopping and any((directory / "cells").glob("*/adapter-best")):
        typer.echo(f"\nBest by {resolved.early_stopping.reward}: {directory}/cells/<cell>/adapter-best")
    typer.echo(f"\n{report_lines(directory / 'report' / 'report.md')}")
