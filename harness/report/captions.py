"""Captions and alternative texts, made from the numbers that a figure was drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from harness.report.formatting import plural

INTERVAL = "95 % t interval over seed means, for this prompt suite"


@dataclass(frozen=True)
class Sample:
    """What a figure's numbers are means of, as ranges over its parts."""

    seeds: tuple[int, int]
    prompts: tuple[int, int]
    pictures: tuple[int, int]

    @property
    def text(self) -> str:
        """``5 training seeds, each the mean over 32 held-out prompts (64 pictures)``."""
        return (
            f"{_range(self.seeds, 'training seed')}, each the mean over {_range(self.prompts, 'held-out prompt')} "
            f"({_range(self.pictures, 'picture')})"
        )


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure with all that is written about it.

    Attributes:
        name: File name without suffix; `<name>.csv` holds `data`, the numbers that are drawn.
        title, caption, alt: Markdown-free text.
        vector: Whether an SVG is written beside the PNG.
        width: In the report, in pixels of the page.
    """

    name: str
    title: str
    figure: Figure
    data: pd.DataFrame
    caption: str
    alt: str
    vector: bool = True
    width: int = 900


def sample(rows: pd.DataFrame) -> Sample:
    """Ranges of the columns `n`, `prompts` and `pictures` over the rows that have data."""
    kept = rows[rows["n"] > 0]

    def reach(column: str) -> tuple[int, int]:
        return (int(kept[column].min()), int(kept[column].max())) if len(kept) else (0, 0)

    return Sample(reach("n"), reach("prompts"), reach("pictures"))


def _range(reach: tuple[int, int], noun: str) -> str:
    low, high = reach
    return plural(high, noun) if low == high else f"{low} to {plural(high, noun)}"
