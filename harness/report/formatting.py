"""Numbers and names as text: precision from the half-width, proper minus signs, nothing that breaks Markdown."""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

from harness.stats.intervals import Interval

DASH = "–"
MAX_DECIMALS = 6
MARKDOWN = re.compile(r"([\\`*_\[\]|#~$!])")


def decimals(half_width: float) -> int:
    """Decimals that show two significant digits of a half-width."""
    if not (math.isfinite(half_width) and half_width > 0):
        return 2
    return min(max(1 - math.floor(math.log10(half_width)), 0), MAX_DECIMALS)


def fixed(value: float, places: int, *, sign: bool = False) -> str:
    """A number with that many decimals, a proper minus, and thousands apart by narrow spaces, a dash if not finite."""
    if not math.isfinite(value):
        return DASH
    text = f"{value:+,.{places}f}" if sign else f"{value:,.{places}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−").replace(",", "\u202f")


def significant(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """A number with that many significant digits, where no interval tells how many matter."""
    if not math.isfinite(value):
        return DASH
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else digits - 1
    return fixed(value, min(max(places, 0), MAX_DECIMALS), sign=sign)


def estimate(interval: Interval, *, sign: bool = True) -> str:
    """``+3.32 [+3.14, +3.49]``, or the estimate and the reason why there is no interval."""
    if not math.isfinite(interval.estimate):
        return DASH
    if not math.isfinite(interval.half_width):
        why = f"n={interval.n}" if interval.n < 2 else "no interval"
        return f"{significant(interval.estimate, sign=sign)} ({why})"
    places = decimals(interval.half_width)
    low, high = fixed(interval.low, places, sign=sign), fixed(interval.high, places, sign=sign)
    return f"{fixed(interval.estimate, places, sign=sign)} [{low}, {high}]"


def bounds(interval: Interval, *, sign: bool = True) -> str:
    """``[+3.14, +3.49]`` alone; a dash where there is no interval."""
    if not math.isfinite(interval.half_width):
        return DASH
    places = decimals(interval.half_width)
    return f"[{fixed(interval.low, places, sign=sign)}, {fixed(interval.high, places, sign=sign)}]"


def scaled(interval: Interval, factor: float) -> Interval:
    """The same interval in another unit."""
    return Interval(
        interval.estimate * factor,
        interval.low * factor,
        interval.high * factor,
        interval.level,
        interval.n,
        interval.standard_error * factor,
        interval.df,
        interval.note,
    )


def p_value(p: float) -> str:
    """``0.008`` or ``<0.001``; a dash where there is no test."""
    if not math.isfinite(p):
        return DASH
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def p_relation(p: float) -> str:
    """``= 0.008`` or ``< 0.001``, for sentences."""
    if not math.isfinite(p):
        return "undefined"
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def count(value: float) -> str:
    """A count, thousands apart."""
    return fixed(value, 0)


def spread(values: list[float], digits: int = 3) -> str:
    """``51 (49–55)``: mean, smallest and largest."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return DASH
    mean = significant(sum(kept) / len(kept), digits)
    low, high = significant(min(kept), digits), significant(max(kept), digits)
    return mean if low == high else f"{mean} ({low}–{high})"


def markdown(text: object) -> str:
    """Text that Markdown and HTML show as it is, on one line, also inside a table."""
    line = " ".join(str(text).split())
    return MARKDOWN.sub(r"\\\1", html.escape(line, quote=False))


def value_text(value: Any) -> str:
    """A configuration value as compact JSON; numbers and plain strings as they are."""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def joined(items: list[str]) -> str:
    """``a, b and c``."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def plural(number: int, noun: str) -> str:
    """``1 seed``, ``5 seeds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
