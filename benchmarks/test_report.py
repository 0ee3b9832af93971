"""Rendering reports of made-up runs, from the records alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.large_run import Size, write_large_run
from harness.report.build import build_report
from tests.report.synthetic import Made, grid_job, main_job, write_run


@pytest.mark.parametrize("made", [main_job(), grid_job()], ids=["main job", "grid of methods and rewards"])
@pytest.mark.benchmark(group="report")
def test_report(benchmark: BenchmarkFixture, tmp_path: Path, made: Made) -> None:
    """Tables, figures and pictures."""
    run = write_run(tmp_path / "run", made)
    benchmark.extra_info["cells"] = len(list((run / "cells").iterdir()))
    benchmark.pedantic(build_report, args=(run,), rounds=3, warmup_rounds=1)


@pytest.mark.benchmark(group="report")
def test_report_of_a_full_grid(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Twenty methods, four rewards, ten seeds, a hundred prompts: a minute and 2 GiB, on two cores with nothing else.

    Wall-clock seconds with the start of Python; a busy machine misses the limit without any fault of the report. Of the
    2 GiB half a GiB is left to the process that writes the figures: its peak cannot be told from its parent's.
    """
    run = write_large_run(tmp_path / "run", Size())
    code = (
        "import resource, sys; from pathlib import Path; from harness.report.build import build_report; "
        "build_report(Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def render() -> tuple[int, float]:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
        return int(done.stdout), time.perf_counter() - start

    kib, seconds = benchmark.pedantic(render, rounds=1)
    benchmark.extra_info["peak_memory_mib"] = kib / 1024
    assert kib < 1.5 * 1024**2
    assert seconds < 60, f"{seconds:.0f} s; load of the last minute {os.getloadavg()[0]:.1f}"
