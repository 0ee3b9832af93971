"""Texts of users in figures: what the font cannot draw is named, never an empty box."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Set
from functools import lru_cache

from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

FONT = "DejaVu Sans"


def readable(text: str) -> str:
    """The text with `[NAME OF THE CHARACTER]` for what the figures' font lacks; invisible joiners are left out."""
    known = _known()
    return "".join(_shown(letter, known) for letter in text)


@lru_cache(maxsize=1)
def _known() -> Set[int]:
    """Code points that the font draws."""
    return frozenset(get_font(findfont(FONT)).get_charmap())


def _shown(letter: str, known: Set[int]) -> str:
    if letter in "\n " or (ord(letter) in known and unicodedata.category(letter) not in ("Cc", "Cf")):
        return letter
    if unicodedata.category(letter) in ("Cf", "Mn", "Me"):
        return ""  # joiners, directions and variants: they change a neighbour and have no shape of their own
    if unicodedata.category(letter).startswith(("C", "Z")):
        return " "
    return f"[{unicodedata.name(letter, f'U+{ord(letter):04X}')}]"


def _plain(label: Callable[..., str]) -> Callable[..., str]:
    return lambda value, position: readable(str(label(value, position)))


def make_readable(figure: Figure) -> None:
    """Replace what cannot be drawn in every text of a figure, tick labels that are names included."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FuncFormatter):  # what `set_yticks` with labels makes
                axis.set_major_formatter(FuncFormatter(_plain(formatter.func)))
    for text in figure.findobj(Text):
        if isinstance(text, Text) and (plain := readable(text.get_text())) != text.get_text():
            text.set_text(plain)
