"""Rendering reports of made-up runs, from the records alone."""

from __future__ import annotations

import subprocess
import sys
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
    """Twenty methods, four rewards, ten seeds, a hundred prompts: seconds, and the peak memory of a fresh process."""
    run = write_large_run(tmp_path / "run", Size())
    code = (
        "import resource, sys; from pathlib import Path; from harness.report.build import build_report; "
        "build_report(Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def render() -> int:
        done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kib = benchmark.pedantic(render, rounds=1)
    benchmark.extra_info["peak_memory_mib"] = kib / 1024
    assert kib < 2 * 1024**2
