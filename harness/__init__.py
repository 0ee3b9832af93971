"""The engine of the benchmark: runs a grid of fine-tuning cells, meters them, evaluates them and reports.

Importing this package loads no torch; `run` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any

    from harness.config import RunConfig

__version__ = "0.1.0"


def run(config: RunConfig | Mapping[str, Any]) -> Path:
    """Run (or resume) a benchmark and render its report.

    Args:
        config: What to run. A mapping of settings is laid over its preset, as the command line does:
            `harness.run({"methods": ["draft", "ddpo"], "seeds": [0, 1, 2]})`. A `RunConfig` is taken as it is.

    Returns:
        The directory of the run; `report/report.md` below it is the report.

    Raises:
        harness.errors.UserError: An argument is wrong; the message says what to do.
        harness.errors.CellsFailed: Some cells crashed; everything else is kept, and the same call resumes.
    """
    from harness.benchmark import run_benchmark
    from harness.config import RunConfig, resolve

    return run_benchmark(config) if isinstance(config, RunConfig) else run_benchmark(resolve(config), config)
