"""`evaluate`: judge what was made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from harness.commands._arguments import report_lines, require_run, words


def evaluate(
    lora: Annotated[
        list[str] | None,
        typer.Option(help="An adapter: PATH, label=PATH, or label=owner/name of the hub; repeat for several."),
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="A folder of pictures, PATH or label=PATH; needs --prompts.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Says which prompt each picture is of: .csv or .jsonl.")] = None,
    scale: Annotated[str, typer.Option(help="Strengths of each adapter, e.g. 1 or 0.5,1.")] = "1",
    rewards: Annotated[
        str, typer.Option(help="Who judges, the first one in the tables' first columns; all: those at hand.")
    ] = "all",
    reward_weights: Annotated[
        list[str] | None, typer.Option(help="hpsv2.1=path/to/file.pt: a file, a directory or owner/name@revision.")
    ] = None,
    model: Annotated[str, typer.Option(help="emoji (embedded), a pipeline directory, or a hub id.")] = "",
    revision: Annotated[str, typer.Option(help="Revision of a hub id.")] = "",
    suite: Annotated[str, typer.Option(help="Prompt suite, NAME=PATH of your copy, or a .txt or .jsonl file.")] = "",
    preset: Annotated[str, typer.Option(help="Whose sampler and evaluation; see `list presets`.")] = "",
    eval_latents: Annotated[int, typer.Option(help="Pictures per evaluation prompt.", min=0)] = 0,
    into: Annotated[Path | None, typer.Option(help="A run whose model, suite and judges are used, and joined.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory; default: results/<preset>-<hash>.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "",
    dtype: Annotated[str, typer.Option(help="Frozen weights: float32, bfloat16, float16, float64.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="sampler.steps=20, evaluation.batch=4 ...")] = None,
) -> None:
    """Judge adapters or pictures that were made elsewhere, on the suite's prompts and the shared noise bank.

    python -m harness evaluate --model path/to/sd --lora mine=path/to/lora --suite animals --rewards all

    Adapters: what diffusers' load_lora_weights reads, PEFT directories, older attention-processor files. Pictures: a
    folder with a file of prompts, in the suite's words. The report is that of a run: base model, gains, pictures, and
    the matrix of rewards. With --into RUN they stand beside its trained methods. See docs/evaluating.md.
    """
    from harness.config import parse_set, resolve
    from harness.elsewhere import Wanted, settings
    from harness.reward_sources import parse_weights

    simple = {
        "model": model, "revision": revision, "suite": suite, "preset": preset, "device": device, "dtype": dtype,
        "out": str(out) if out else "",
    }  # fmt: skip
    flags: dict[str, Any] = {key: value for key, value in simple.items() if value}
    if eval_latents:
        flags["evaluation"] = {"latents": eval_latents}
    flags["reward_weights"] = parse_weights(reward_weights or [])
    wanted = Wanted(tuple(lora or ()), tuple(images or ()), prompts, scale, tuple(words(rewards)))
    if into:
        require_run(into)
    passed = settings(wanted, flags, parse_set(set_ or []), into)
    resolved = resolve(passed)

    from harness.benchmark import run_benchmark
    from harness.progress import Display

    with Display() as display:
        directory = run_benchmark(resolved, passed, display.event, display.start)
    typer.echo(f"\n{report_lines(directory / 'report' / 'report.md')}")
