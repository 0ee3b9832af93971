"""Rendering reports of made-up runs, from the records alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from harness.report.build import build_report
from tests.report.synthetic import Made, grid_job, main_job, write_run


@pytest.mark.parametrize("made", [main_job(), grid_job()], ids=["main job", "grid of methods and rewards"])
@pytest.mark.benchmark(group="report")
def test_report(benchmark: BenchmarkFixture, tmp_path: Path, made: Made) -> None:
    """Tables, figures and pictures."""
    run = write_run(tmp_path / "run", made)
    benchmark.extra_info["cells"] = len(list((run / "cells").iterdir()))
    benchmark.pedantic(build_report, args=(run,), rounds=3, warmup_rounds=1)
