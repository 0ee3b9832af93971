"""The comparison of tables with the page can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.calibration.page import Page, Table
from tests.calibration.rates import Rate, assert_at_least, assert_at_most, assert_exact

PLACE = (
    "before\n\n<!-- calibration: a -->\n<!-- /calibration -->\n\n<!-- calibration: b -->\nkept\n<!-- /calibration -->\n"
)


def table(rate: Rate, name: str = "x") -> Table:
    """A table of one rate."""
    return Table(["case", "rate"], [[name, rate]], "1000 repetitions.")


def test_a_table_is_written_and_found_again(tmp_path: Path) -> None:
    """Rounding is forgiven, other numbers, other words and other lengths are not."""
    path = tmp_path / "page.md"
    path.write_text(PLACE)
    page = Page(path)
    with pytest.raises(pytest.fail.Exception, match="0 lines on the page"):
        page.check("a", table(Rate(950, 1000)))
    page.write("a", table(Rate(950, 1000)))
    page.write("a", table(Rate(950, 1000)))
    assert path.read_text().count("| x | 0.950 |") == 1
    assert path.read_text().endswith("\nkept\n<!-- /calibration -->\n")
    page.check("a", table(Rate(952, 1000)))
    for other in (table(Rate(953, 1000)), table(Rate(950, 1000), "y")):
        with pytest.raises(pytest.fail.Exception, match=r"the page has '\| x \| 0.950 \|'"):
            page.check("a", other)
    with pytest.raises(pytest.fail.Exception, match="has no place"):
        page.write("c", table(Rate(950, 1000)))


def test_bands() -> None:
    """Of 1000 repetitions at .95 a band of three standard errors is .929 to .971."""
    for hits, holds in ((928, False), (930, True), (970, True), (972, False)):
        rate = Rate(hits, 1000)
        checks = {assert_exact: holds, assert_at_least: hits > 929, assert_at_most: hits < 971}
        for check, expected in checks.items():
            try:
                check(rate, 0.95)
                passed = True
            except AssertionError:
                passed = False
            assert passed == expected
