"""The command line. Nothing heavy is imported before a command needs it, so that --help is immediate."""

from __future__ import annotations

import os
import sys

import typer

from harness.commands.baseline import baseline
from harness.commands.check import check
from harness.commands.compare import compare
from harness.commands.evaluate import evaluate
from harness.commands.list import list_
from harness.commands.mix import mix
from harness.commands.plan import plan
from harness.commands.report import report
from harness.commands.run import run
from harness.commands.score import score
from harness.commands.status import status
from harness.errors import CellsFailed, ContractsBroken, Regressed, Undecided, UserError

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

for _command in (run, report, evaluate, score, mix, compare, status, check, plan):
    app.command()(_command)
app.command("list")(list_)
app.add_typer(baseline, name="baseline")


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2; a failed cell, contract, comparison 1; Ctrl-C 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on parts that nothing here uses
    try:
        if app(standalone_mode=False) == 130:  # how newer versions of typer hand on a KeyboardInterrupt
            raise KeyboardInterrupt
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Undecided as error:
        print(f"undecided: {error}", file=sys.stderr)
        sys.exit(2)
    except (CellsFailed, ContractsBroken, Regressed) as error:
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
