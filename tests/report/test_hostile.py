"""Prompts and labels that try to be something else than text."""

import csv
import html
import re
import unicodedata
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.font_manager import findfont, get_font

from harness.report.build import build_report
from harness.report.glyphs import FONT, readable
from tests.report.synthetic import Made, write_run

PROMPTS = (
    "a `cat` | a <b>dog</b> & $x_1$ \\frac",
    "![x](y) [link](http://e) **bold**\n# title\n\n| a | b |\n|---|---|",
    "</script><script>alert(1)</script>",
    '"quoted", comma; <img src=x onerror="alert(2)">',
    "é 猫 🐈\u200d⬛ 👩🏽\u200d🚀",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "&lt;i&gt; &amp; <!-- comment --> ``` ~~~",
    "long " * 400,
)
ARM = "draft K=5 | <i>` 🐧"


class Elements(HTMLParser):
    """Names of all elements of a document, and the alternative texts of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the name."""
        self.names.append(tag)
        self.alts += [value or "" for key, value in attrs if key == "alt"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with such prompts and labels, made without any complaint about missing glyphs."""
    folder = tmp_path_factory.mktemp("hostile")
    made = Made(
        arms=(ARM, "ddpo $_$"),
        seeds=2,
        rewards=(("emoji-3d", "proxy", "log-odds"),),
        prompts={"training": PROMPTS[:2], "held-out": PROMPTS},
        diverged=("ddpo $_$--emoji-3d--seed0",),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph .* missing")
        return build_report(write_run(folder, made)).parent


def test_no_text_becomes_an_element(report: Path) -> None:
    """The Markdown holds only the elements that the report itself writes, and every cell of a table its own columns."""
    text = (report / "report.md").read_text()
    found = Elements()
    found.feed(re.sub(r"`[^`\n]*`", "", text))
    assert set(found.names) <= {"img", "details", "summary"}
    assert not re.search(r"(?<!\\)\]\((y|http://e)\)", text)
    assert "\n# title" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_alternative_texts_say_the_label_as_it_is(report: Path) -> None:
    """An alternative text shows markup and emoji as characters."""
    found = Elements()
    found.feed((report / "report.md").read_text())
    assert found.alts
    assert all(ARM in alt for alt in found.alts if "Grid of pictures" in alt)
    raw = re.findall(r'alt="([^"]*)"', (report / "report.md").read_text())
    assert any(html.escape(ARM, quote=True) in alt for alt in raw)


def test_files_of_numbers_keep_every_prompt_to_the_letter(report: Path) -> None:
    """What was written comes back, by pandas and by the standard library."""
    path = report / "fig-05-pictures-1.csv"
    assert set(pd.read_csv(path)["prompt"]) == set(PROMPTS)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    assert {row["arm"] for row in rows} == {"base", ARM, "ddpo $_$"}


def test_what_the_font_lacks_is_named() -> None:
    """Every character that is left can be drawn; emoji have their Unicode names."""
    assert readable("a 🐈 é") == "a [CAT] é"
    assert readable("👩\u200d🚀") == "[WOMAN][ROCKET]"
    known = get_font(findfont(FONT)).get_charmap()
    for prompt in PROMPTS:
        shown = readable(prompt)
        assert all(ord(letter) in known for letter in shown if letter not in "\n ")
        assert all(unicodedata.category(letter) != "Cf" for letter in shown)
    assert "[CJK UNIFIED IDEOGRAPH-732B]" in readable(PROMPTS[4])


def test_figures_draw_names_of_characters(report: Path) -> None:
    """The label stands in the drawing as text of the font: its SVG has no box for a missing glyph."""
    drawn = (report / "fig-01-forest.svg").read_text()
    assert "[PENGUIN]" in drawn
    assert "🐧" not in drawn
