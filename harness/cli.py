"""The command line. Nothing heavy is imported before a command needs it, so that --help is immediate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.errors import CellsFailed, ContractsBroken, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Benchmark methods that fine-tune text-to-image diffusion models on rewards.\n\n"
    "Start here:  python -m harness run --methods draft,ddpo --seeds 5\n\n"
    "It trains every method with every seed on the embedded small model, scores all of them on the same prompts and "
    "latents, and writes results/<run>/report/report.md. The same command resumes an interrupted run.",
)


@app.command()
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
    out: Annotated[Path | None, typer.Option(help="Directory of the run; default: results/<preset>-<hash>.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; default: one per core or GPU.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "",
    dtype: Annotated[str, typer.Option(help="Frozen weights: float32, bfloat16, float16, float64.")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="draft-k.k=5, sampler.steps=20, adapter.rank=8; repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with any of these settings.")] = None,
    keep_images: Annotated[str, typer.Option(help="Evaluated pictures: final or none.")] = "",
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
        flags["evaluation_rewards"] = _words(eval_rewards)
    if reward_weights:
        from harness.reward_sources import parse_weights

        flags["reward_weights"] = parse_weights(reward_weights)
    if methods:
        flags["methods"] = _words(methods)
    if arm:
        flags["arms"] = [vars(parse_arm(text)) for text in arm]
    if rewards:
        flags["rewards"] = _words(rewards)
    if seeds:
        flags["seeds"] = parse_seeds(seeds)
    if budget:
        flags["budget"] = parse_budget(budget)
    if eval_latents:
        flags["evaluation"] = {"latents": eval_latents}
    if lora_scale or lora_steps:
        flags["variants"] = parse_variants(lora_scale, lora_steps)
    if out:
        flags["out"] = str(out)
    passed = merge(merge(passed, flags), parse_set(set_ or []))
    resolved = resolve(passed)

    from harness.benchmark import plan, run_benchmark

    if dry_run:
        from harness.estimate import describe_cost

        typer.echo(describe_cost(plan(resolved)))
        return
    from harness.progress import Display

    with Display() as display:
        directory = run_benchmark(resolved, passed, display.event, display.start)
    typer.echo(f"\nReport: {directory / 'report' / 'report.md'}")


def _words(text: str) -> list[str]:
    from harness.config import split_outside_brackets

    return [word.strip() for word in split_outside_brackets(text, ",") if word.strip()]


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Directory of a run, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default: DIRECTORY/report.")] = None,
) -> None:
    """Render the report of a run from its records alone (needs no torch)."""
    _require_run(directory)
    from harness.report.build import build_report

    typer.echo(f"Report: {build_report(directory, out)}")


@app.command()
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
    wanted = Wanted(tuple(lora or ()), tuple(images or ()), prompts, scale, tuple(_words(rewards)))
    if into:
        _require_run(into)
    passed = settings(wanted, flags, parse_set(set_ or []), into)
    resolved = resolve(passed)

    from harness.benchmark import run_benchmark
    from harness.progress import Display

    with Display() as display:
        directory = run_benchmark(resolved, passed, display.event, display.start)
    typer.echo(f"\nReport: {directory / 'report' / 'report.md'}")


@app.command()
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
    weights, names = parse_weights(reward_weights or []), _words(rewards)
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


@app.command()
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

    _require_run(directory)

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


@app.command()
def status(directory: Annotated[Path, typer.Argument(help="Directory of a run.")]) -> None:
    """Show how far a run is: a line per cell."""
    from harness.progress import status_lines

    _require_run(directory)
    for line in status_lines(directory):
        typer.echo(line)


def _require_run(directory: Path) -> None:
    if not (directory / "run.json").is_file():
        raise UserError(f"{directory} holds no run (no run.json); runs are below results/")


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="methods, rewards, suites, models or presets.")],
) -> None:
    """List what can be named on the command line."""
    from harness.errors import nearest
    from harness.registry import discover, embedded_models, find_model, pipeline_classes

    if kind in ("methods", "rewards", "suites"):
        rows = [(p.name, _tags(p.attributes), p.description) for p in discover(kind).values()]
    elif kind == "models":
        rows = [(name, "embedded", str(path)) for name, path in embedded_models().items()]
        rows += [(find_model("gaussian").name, "test", "closed-form Gaussian, no weights")]
        rows += [("PATH", "", f"a directory as diffusers saves a {p}, or a hub id") for p in pipeline_classes()]
    elif kind == "presets":
        from harness.config import load_yaml, presets

        rows = [(name, "", str(load_yaml(path, "preset").get("description", ""))) for name, path in presets().items()]
    else:
        known = ["methods", "rewards", "suites", "models", "presets"]
        raise UserError(f"there is no list of {kind!r}; {nearest(kind, known)}")
    width = max(len(name) for name, _, _ in rows)
    tag_width = max(len(tags) for _, tags, _ in rows)
    for name, tags, description in rows:
        typer.echo(f"{name:<{width}}  {tags:<{tag_width}}  {description}".rstrip())


@app.command()
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
    for outcome in contracts.check(checked, _words(only)):
        outcomes.append(outcome)
        for line in contracts.lines(outcome):
            typer.echo(line)
    typer.echo(f"\n{method}: {contracts.summary(outcomes)}")
    failed = [outcome.contract.name for outcome in outcomes if outcome.state == "FAILED"]
    if failed:
        raise ContractsBroken(f"{', '.join(failed)}; again with: python -m harness check {method} --only {failed[0]}")


def _tags(attributes: dict[str, Any]) -> str:
    tags = [
        str(attributes.get("role", attributes.get("kind", ""))),
        f"v{attributes['version']}" if "version" in attributes else "",
    ]
    if attributes.get("needs_reward_gradient"):
        tags.append("needs the reward's gradient")
    if attributes.get("differentiable") is False:
        tags.append("not differentiable")
    if attributes.get("family") == "named":
        tags.append("when named")
    return ", ".join(tag for tag in tags if tag)


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2, a failed cell or contract 1, Ctrl-C 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on parts that nothing here uses
    try:
        if app(standalone_mode=False) == 130:  # how newer versions of typer hand on a KeyboardInterrupt
            raise KeyboardInterrupt
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (CellsFailed, ContractsBroken) as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        print("\ninterrupted; the same command resumes the run", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename or ''}; what was finished is kept", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's usage errors
        if usage is None:
            raise
        print(f"error: {usage()}", file=sys.stderr)
        sys.exit(2)
