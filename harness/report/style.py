"""How figures look: palette, markers, sizes, and how they are written without a trace of time or place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from harness.report.glyphs import FONT, make_readable

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, without yellow
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")
BASE_COLOUR = "#000000"
INK, GREY, PALE = "#222222", "#6b6b6b", "#e4e4e4"
DPI = 150
PICTURE_DPI = 75
DIVERGING, CORRELATION = "RdBu", "PuOr"


@dataclass(frozen=True)
class Look:
    """How one arm is drawn, in every figure."""

    colour: str
    marker: str
    line: str


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """Colour, marker and line of each arm by its position in the run; colours repeat with another line."""
    return {
        arm: Look(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], LINES[i // len(PALETTE) % len(LINES)])
        for i, arm in enumerate(arms)
    }


@contextmanager
def drawing() -> Iterator[None]:
    """Settings that hold while figures are drawn and written."""
    settings: dict[Any, Any] = {
        "font.family": FONT,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": PALE,
        "grid.linewidth": 0.8,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "text.color": INK,
        "text.parse_math": False,
        "figure.facecolor": "white",
        "figure.dpi": DPI,
        "savefig.facecolor": "white",
        "svg.hashsalt": "draft-bench",
        "svg.fonttype": "path",
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        yield


def write_figure(figure: Figure, path: Path, *, vector: bool = True) -> None:
    """Write `path`.png and `path`.svg, the same bytes for the same figure.

    Files stay small: a figure that has no SVG is made of pictures, which do not get sharper with more pixels; the
    others have few colours, so that a palette of 256 does.
    """
    make_readable(figure)
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine("none")  # placed once: every format gets the same layout
    png = path.with_suffix(".png")
    figure.savefig(png, dpi=DPI if vector else PICTURE_DPI, metadata={"Software": None})
    if vector:
        with Image.open(png) as drawn:
            indexed = drawn.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        indexed.save(png, optimize=True)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})


def roomy() -> ConstrainedLayoutEngine:
    """The layout of figures with several panels."""
    return ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)


def zero_line(axes: Axes, *, vertical: bool) -> None:
    """The base model's place on an axis of gains."""
    (axes.axvline if vertical else axes.axhline)(0, color=BASE_COLOUR, linewidth=1.2, zorder=1)
