"""The engine of the benchmark: runs a grid of fine-tuning cells, meters them, evaluates them and reports.

Importing this package loads no torch; `run` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from harness.config import RunConfig

__version__ = "0.1.0"


def run(config: RunConfig) -> Path:
    """Run (or resume) a benchmark and render its report.

    Args:
        config: What to run; `harness.config.RunConfig(methods=["draft", "ddpo"])` is enough.

    Returns:
        The directory of the run; `report/report.md` below it is the report.

    Raises:
        harness.errors.UserError: An argument is wrong; the message says what to do.
        harness.errors.CellsFailed: Some cells crashed; everything else is kept, and the same call resumes.
    """
    from harness.main_job import run_benchmark

    return run_benchmark(config)
