"""Numbers are shown with the precision that their interval has."""

import math

import pytest

from harness.report import formatting as f
from harness.stats.intervals import Interval


@pytest.mark.parametrize(
    ("estimate", "half", "text"),
    [
        (3.3162, 0.1777, "+3.32 [+3.14, +3.49]"),
        (-0.27312, 0.0196, "−0.273 [−0.293, −0.254]"),
        (1234.4, 520.0, "+1\u202f234 [+714, +1\u202f754]"),
        (0.0, 0.001, "0.0000 [−0.0010, +0.0010]"),
    ],
)
def test_two_significant_digits_of_the_half_width(estimate: float, half: float, text: str) -> None:
    """The half-width decides the decimals of all three numbers."""
    assert f.estimate(Interval(estimate, estimate - half, estimate + half, n=5)) == text


def test_no_interval_is_said_and_never_zero() -> None:
    """A missing interval has its reason in words."""
    nothing = float("nan")
    assert f.estimate(Interval(1.5, nothing, nothing, n=1)) == "+1.50 (n=1)"
    assert f.estimate(Interval(1.5, nothing, nothing, n=5)) == "+1.50 (no interval)"
    assert f.estimate(Interval(nothing, nothing, nothing)) == "–"


@pytest.mark.parametrize(("p", "text"), [(0.00794, "0.008"), (0.0001, "<0.001"), (1.0, "1.000"), (math.nan, "–")])
def test_p_values(p: float, text: str) -> None:
    """Three decimals or the bound below."""
    assert f.p_value(p) == text


def test_markdown_is_escaped_on_one_line() -> None:
    """Pipes, backticks, tags and line breaks do no harm."""
    assert f.markdown("a|b\n`c` <d>") == "a\\|b \\`c\\` &lt;d&gt;"


def test_counts_and_spreads() -> None:
    """Thousands, ranges and lists as people write them."""
    assert f.count(12800.0) == "12\u202f800"
    assert f.spread([35.1, 37.0, 39.1]) == "37.1 (35.1–39.1)"
    assert f.spread([]) == "–"
    assert f.joined(["a", "b", "c"]) == "a, b and c"
