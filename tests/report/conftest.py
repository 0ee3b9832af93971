"""Made-up runs and their reports, written once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.report.build import build_report
from tests.report.synthetic import main_job, write_run


@pytest.fixture(scope="session")
def main_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, one reward, five seeds."""
    return write_run(tmp_path_factory.mktemp("main"), main_job())


@pytest.fixture(scope="session")
def main_report(main_run: Path) -> Path:
    """Folder of the report of `main_run`."""
    return build_report(main_run).parent
