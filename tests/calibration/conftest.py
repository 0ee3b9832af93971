"""The option that writes tables into the page, and the fixture through which every table goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.calibration.page import Page, Table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "statistics.md"
Publish = Callable[[str, Table], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Writing is asked for; comparing is what happens otherwise."""
    parser.addoption("--write-tables", action="store_true", help="write the tables of docs/statistics.md anew")


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Publish:
    """Called with a table's name and the table: the page has it, or has it from now on."""
    page = Page(PAGE)
    return page.write if request.config.getoption("--write-tables") else page.check
