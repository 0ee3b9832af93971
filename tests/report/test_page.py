"""The report as one HTML page: complete, self-contained, small, and safe from what records hold."""

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from harness.report.analysis import analyse
from harness.report.build import build_report
from harness.report.page import figures, write
from harness.report.page.document import convert, slug
from harness.report.page.explorer import script_json
from harness.report.page.inline import SIDE, Group, Stored, inline
from harness.report.page.write import write_page
from harness.report.records import load_run
from harness.report.style import PALETTE
from tests.report.synthetic import main_job, write_run

TEMPLATES = Path(figures.__file__).parents[1] / "templates"
HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "<!-- <script> ]]> --> <img src=x onerror=document.title='broken'>",
    "\"quotes' `code` & &lt;entity&gt; | pipe \\ ![x](http://example.org/x.png) [l](javascript:alert(1))",
    "\u202eright to left\u202c שלום عربى",
    "🐈\u200d⬛ é 猫 \u2028 line separator",
    "very long " * 600,
)
LABELS = ("draft </script><b>", "ddpo \"x' onload=1")


class Page(HTMLParser):
    """What tests look at: tags with attributes, ids, tables as lists of texts, contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        named = {name: value or "" for name, value in attrs}
        self.tags.append((tag, named))
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append((named, ""))

    def handle_endtag(self, tag: str) -> None:
        """An element ends."""
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Text, where it stands."""
        if "script" in self.open:
            named, text = self.scripts[-1]
            self.scripts[-1] = (named, text + data)
        elif "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        elif "style" not in self.open:
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every element of a kind."""
        return [named for name, named in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        """What the explorer draws."""
        found = [text for named, text in self.scripts if named.get("id") == "explorer-data"]
        return dict(json.loads(found[0]))


@pytest.fixture(scope="module")
def page(main_report: Path) -> Page:
    """The page of two arms, one reward, five seeds."""
    return Page((main_report / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose prompts and labels are attacks."""
    made = main_job(arms=LABELS, seeds=2, latents=1, prompts={"training": HOSTILE[:1], "held-out": HOSTILE})
    run = write_run(tmp_path_factory.mktemp("hostile"), renamed(made))
    return build_report(run).with_name("report.html")


def page_of(run: Path, folder: Path, text: str = "# Title\n\n## Conclusions\n") -> Path:
    """The page alone, around a given text: drawing figures takes most of a report's time."""
    folder.mkdir(parents=True, exist_ok=True)
    write_page(analyse(load_run(run)), text, folder)
    return folder / "report.html"


def renamed(made: Any) -> Any:
    """Labels may hold what names of directories must not: this run keeps no pictures."""
    return type(made)(**{**vars(made), "arms": tuple(label.replace("/", "|") for label in made.arms), "images": False})


def plain(cell: str) -> str:
    """A cell of a Markdown table as a reader sees it."""
    return html.unescape(re.sub(r"\\([\\`*_\[\]|#~$!])", r"\1", re.sub(r"(?<!\\)(\*\*|`)", "", cell)))


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Tables of a report, cell by cell, without the rule below the head."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    lines = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]
    return [[[spaced(plain(unlinked(cell))) for cell in row] for i, row in enumerate(rows) if i != 1] for rows in lines]


def unlinked(text: str) -> str:
    """Of a link, its text."""
    return re.sub(r"\[([^\]]+)\]\([^)]*status\.json\)", r"\1", text)


def spaced(text: str) -> str:
    """With one space wherever there are any."""
    return " ".join(text.split())


def test_the_page_has_every_table_and_figure_of_the_text_in_its_order(main_report: Path, page: Page) -> None:
    """Cell by cell, and figure by figure by their alternative texts."""
    text = (main_report / "report.md").read_text(encoding="utf-8")
    expected = markdown_tables(text)
    assert len(expected) > 15
    assert [[[spaced(cell) for cell in row] for row in table] for table in page.tables] == expected
    alts = [html.unescape(found) for found in re.findall(r'<img [^>]*alt="([^"]*)"', text)]
    assert len(alts) == len(list(main_report.glob("fig-*.png")))
    assert [image["alt"] for image in page.of("img")] == alts
    headings = [spaced(plain(found)) for found in re.findall(r"^#{2,3} (.*)$", text, flags=re.M)]
    linked = [named["href"][1:] for named in page.of("a") if named.get("href", "").startswith("#")][1:]
    assert len(linked) == len(headings) + 1
    assert all(spaced(text) in {spaced(word) for word in page.words} for text in headings)


def test_ids_are_unique_and_whatever_refers_to_one_finds_it(page: Page) -> None:
    """Links, labels and names of sections."""
    ids = [named["id"] for _, named in page.tags if "id" in named]
    assert len(ids) == len(set(ids))
    wanted = [named["href"][1:] for named in page.of("a") if named["href"].startswith("#")]
    wanted += [named["aria-labelledby"] for _, named in page.tags if "aria-labelledby" in named]
    assert wanted
    assert set(wanted) <= set(ids)


def test_nothing_is_loaded_from_elsewhere(main_report: Path, page: Page) -> None:
    """Figures are inside; links lead to files beside the page; the policy forbids the rest."""
    assert all(image["src"].startswith("data:image/") for image in page.of("img"))
    assert {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags} == {"link", "form"}
    assert [link["href"] for link in page.of("link")] == ["data:,"]
    files = {named["href"] for named in page.of("a") if not named["href"].startswith("#")}
    assert files
    assert all((main_report / name).is_file() for name in files)
    style = (TEMPLATES / "page.css").read_text()
    assert "url(" not in style
    assert "@import" not in style
    policy = page.of("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert "default-src 'none'" in policy["content"]
    assert "unsafe" not in policy["content"]
    assert not any("style" in named or any(key.startswith("on") for key in named) for _, named in page.tags)


def test_the_same_records_give_the_same_bytes(main_report: Path, tmp_path: Path) -> None:
    """Shuffled rows, another place, the same place of the report relative to the run."""
    run = write_run(tmp_path / "elsewhere", main_job(), shuffle=5)
    shutil.copytree(main_report, run / "report", ignore=shutil.ignore_patterns("report.html"))
    again = page_of(run, run / "report", (main_report / "report.md").read_text(encoding="utf-8"))
    assert again.read_bytes() == (main_report / "report.html").read_bytes()
    assert str(tmp_path) not in again.read_text(encoding="utf-8")


def test_a_page_elsewhere_finds_the_pictures_of_the_run(main_run: Path, tmp_path: Path) -> None:
    """The address of the run is relative to where the page lies."""
    made = page_of(main_run, tmp_path / "deep" / "out")
    data = Page(made.read_text(encoding="utf-8")).data
    assert not Path(data["root"]).is_absolute()
    assert (made.parent / data["root"]).resolve() == main_run.resolve()


def test_explored_numbers_are_those_of_the_records(main_run: Path, page: Page) -> None:
    """Gains and interval recomputed the long way; scores and stored pictures as on disk."""
    data = page.data
    names = [reward["name"] for reward in data["rewards"]]
    tables = {path.parent.name: pd.read_parquet(path) for path in (main_run / "cells").glob("*/scores.parquet")}

    def final(cell: str) -> pd.Series:
        rows = tables[cell]
        rows = rows[(rows["reward"] == "emoji-3d") & (rows["split"] == "held-out") & (rows["point"] == "final")]
        return rows.set_index(["prompt_id", "noise_id"])["score"]

    gain = data["gains"][0][1][names.index("emoji-3d")]
    cells = [f"ddpo--emoji-3d--seed{seed}" for seed in range(5)]
    expected = [(final(cell) - final("base")).mean() for cell in cells]
    assert gain["values"] == pytest.approx(expected, rel=1e-5)
    low, high = stats.t.interval(0.95, 4, np.mean(expected), stats.sem(expected))
    assert gain["interval"] == pytest.approx([np.mean(expected), low, high], rel=1e-4, abs=1e-5)
    assert data["cells"][0][1] == cells

    [stored] = data["stored"][cells[2]]
    assert stored["point"] == "final"
    assert stored["spent"][0] == 256
    shown = [final(cells[2])[identity, noise] for identity, _, noise in data["prompts"]]
    assert stored["scores"] == pytest.approx(shown, rel=1e-3)
    assert data["base_scores"][0] == pytest.approx([final("base")[i, n] for i, _, n in data["prompts"]], rel=1e-3)

    curve = data["curves"][0][0]
    early = tables["draft--emoji-3d--seed3"]
    early = early[(early["reward"] == "emoji-3d") & (early["point"] == "64")].set_index(["prompt_id", "noise_id"])
    value = (early["score"] - final("base").reindex(early.index)).mean()
    assert curve["spent"][0][3] == [32, 64, 128, 256]
    assert curve["by_reward"][str(names.index("emoji-3d"))]["values"][3][1] == pytest.approx(value, rel=1e-5)


def test_inline_pictures_are_those_of_the_run(main_run: Path, page: Page) -> None:
    """Each preview is near the file that it stands for, and no other prompt's."""
    data = page.data
    for cell in ("base", "draft--emoji-3d--seed1"):
        [stored] = data["stored"][cell]
        for place in (0, 7):
            identity, _, noise = data["prompts"][place]
            with Image.open(io.BytesIO(base64.b64decode(stored["pictures"][place]))) as preview:
                seen = np.asarray(preview.convert("RGB"), dtype=float)
            distance = {}
            for other, _, _ in data["prompts"]:
                with Image.open(main_run / "cells" / cell / "images" / "final" / f"{other}--{noise}.png") as kept:
                    distance[other] = np.abs(np.asarray(kept, dtype=float) - seen).mean()
            assert distance[identity] == min(distance.values()) < 6 < max(distance.values())


def test_points_of_training_with_pictures_are_told_from_those_without(main_run: Path, tmp_path: Path) -> None:
    """A point is listed where files are, in the order of training, for the prompts that have one."""
    run = shutil.copytree(main_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    images = run / "cells" / "draft--emoji-3d--seed0" / "images"
    for point in ("128", "32"):
        shutil.copytree(images / "final", images / point)
    for path in (images / "32").glob("he-03--*.png"):
        path.unlink()
    data = Page(page_of(run, run / "report").read_text(encoding="utf-8")).data
    points = data["stored"]["draft--emoji-3d--seed0"]
    assert [point["point"] for point in points] == ["32", "128", "final"]
    assert [point["spent"][0] for point in points] == [32, 128, 256]
    kept = [[bool(int(data["masks"][p["stored"]][i // 4], 16) >> (i % 4) & 1) for i in range(10)] for p in points]
    assert kept == [[i != 3 for i in range(10)], [True] * 10, [True] * 10]
    assert points[0]["pictures"][3] == 0
    assert all(points[1]["pictures"])


def test_hostile_texts_are_texts(hostile: Path) -> None:
    """Prompts and labels come back from the JSON as they were; none became an element or ended one."""
    text = hostile.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.scripts) == 2
    assert [prompt for _, prompt, _ in page.data["prompts"]] == list(HOSTILE)
    assert [arm["label"] for arm in page.data["arms"]] == [label.replace("/", "|") for label in LABELS]
    assert text.count("<script") == 2
    assert text.count("</script") == 2
    assert "<!--" not in text
    assert not [named for _, named in page.tags if "onerror" in named or "onload" in named]
    assert not [named for named in page.of("img") if not named["src"].startswith("data:")]
    assert not [named for named in page.of("a") if "javascript" in named["href"]]
    assert "b" not in {tag for tag, _ in page.tags}


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_survives_the_script_element(text: str) -> None:
    """Whatever it is, JSON gives it back, and no character that HTML reads is left."""
    written = script_json({"text": text})
    assert json.loads(written) == {"text": text}
    assert not set(written) & set("<>&\u2028\u2029")


@given(st.lists(st.text(max_size=20), max_size=8))
def test_ids_of_headings_are_unique_words(titles: list[str]) -> None:
    """Letters, digits and hyphens, none twice."""
    taken: set[str] = set()
    found = [slug(title, taken) for title in titles]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in found)


def test_sections_are_closed_and_the_explorer_has_a_place() -> None:
    """One section for each second-level heading, whatever their number; the first one is the head."""
    for number in range(4):
        text = "# Title\n\nLead.\n" + "".join(f"\n## Part {i}\n\nText {i}.\n" for i in range(number))
        document = convert(text, str)
        for part in (document.head, document.body):
            assert part.count("<section") == part.count("</section>")
        assert (document.head + document.body).count("<section") == number
        assert ("Text 0." in document.head) == (number > 0)
        assert "Text 1." not in document.head


def noise_pictures(folder: Path, number: int) -> dict[Stored, Path]:
    """Pictures that do not compress."""
    random = np.random.default_rng(0)
    paths = {}
    for i in range(number):
        paths[Stored("cell", "final", i)] = folder / f"{i}.png"
        Image.fromarray(random.integers(0, 256, (256, 320, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return paths


def test_pictures_inside_the_page_keep_to_the_budget(tmp_path: Path) -> None:
    """Groups are taken whole and in order, as long as they fit; previews are small; broken files stay outside."""
    paths = noise_pictures(tmp_path, 9)
    paths[Stored("cell", "final", 8)].write_bytes(b"no picture")
    groups = [Group("first", (Stored("cell", "final", 8), Stored("cell", "final", 7)))]
    groups += [Group("first", tuple(Stored("cell", "final", i + j) for j in range(2))) for i in (0, 2)]
    groups += [Group("second", (Stored("cell", "final", 6),))]
    every = inline(groups, paths.__getitem__, budget=10_000_000)
    assert every.prompts == {"first": 3, "second": 1}
    sizes = {stored.prompt: len(base64.b64decode(content)) for stored, content in every.pictures.items()}
    assert set(sizes) == {0, 1, 2, 3, 6, 7}
    with Image.open(io.BytesIO(base64.b64decode(every.pictures[Stored("cell", "final", 0)]))) as picture:
        assert max(picture.size) == SIDE
    budget = sizes[7] + sizes[0] + sizes[1] + sizes[2]
    some = inline(groups, paths.__getitem__, budget=budget)
    assert {stored.prompt for stored in some.pictures} == {7, 0, 1}
    assert some.prompts == {"first": 2, "second": 0}
    assert inline(groups, paths.__getitem__, budget=0).pictures == {}


def test_a_long_report_leaves_less_room_for_pictures(
    main_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page keeps to its limit: whole prompts are left out as the text grows."""
    limit = 300_000
    monkeypatch.setattr(write, "LIMIT", limit)
    monkeypatch.setattr(write, "NUMBERS", 250_000)
    inside = []
    for words in (100, 20_000):
        made = page_of(main_run, tmp_path / str(words), "# Title\n\n## Part\n\n" + "a " * words)
        assert made.stat().st_size < limit
        stored = Page(made.read_text(encoding="utf-8")).data["stored"]
        inside.append(sum(bool(picture) for cell in stored.values() for p in cell for picture in p["pictures"]))
    assert inside[0] > inside[1] > 0


def test_figures_that_are_too_many_stay_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small drawings as SVG, others as pictures, and names beyond the allowance or for what is not there."""
    for i, path in enumerate(noise_pictures(tmp_path, 3).values()):
        path.rename(tmp_path / f"fig-{i}.png")
    (tmp_path / "fig-0.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "fig-1.svg").write_text("<svg>" + " " * figures.VECTOR)
    source = figures.embedder(tmp_path)
    assert source("fig-0.png").startswith("data:image/svg+xml;")
    assert base64.b64decode(source("fig-1.png").split(",")[1]) == (tmp_path / "fig-1.png").read_bytes()
    assert source("fig-2.png").startswith("data:image/webp;")
    assert [source(name) for name in ("fig-9.png", "../fig-0.png", "x.svg")] == ["fig-9.png", "../fig-0.png", "x.svg"]
    monkeypatch.setattr(figures, "TOTAL", 1000)
    source = figures.embedder(tmp_path)
    assert source("fig-1.png") == "fig-1.png"
    assert source("fig-0.png").startswith("data:")


def test_a_run_without_scores_has_a_page_without_an_explorer(tmp_path: Path) -> None:
    """There is nothing to choose from; the text is there."""
    cells = ("base", *(f"{arm}--emoji-3d--seed{seed}" for arm in ("draft", "ddpo") for seed in range(5)))
    made = page_of(write_run(tmp_path, main_job(missing=cells)), tmp_path / "report", "# Title\n\nNothing yet.\n")
    page = Page(made.read_text(encoding="utf-8"))
    assert len(page.scripts) == 1
    assert "Explore" not in page.words
    assert "Nothing yet." in page.words


def shades() -> Iterator[tuple[str, float, tuple[str, str]]]:
    """Paper and edge of each theme, and the share of a method's colour in lines and outlines, as the style has them."""
    style = (TEMPLATES / "page.css").read_text()
    themes = {name: re.search(rf"--{name}: light-dark\((#\w+), (#\w+)\)", style) for name in ("paper", "edge")}
    shares = {
        float(found) / 100 for found in re.findall(r"color-mix\(in srgb, var\(--c\) (\d+)%, var\(--edge\)\)", style)
    }
    assert len(shares) == 2
    for group in (1, 2):
        paper, edge = (found[group] for found in themes.values() if found)
        for share in shares:
            yield paper, share, (edge, f"{paper} {share}")


def luminance(rgb: np.ndarray) -> float:
    """Relative luminance of WCAG 2."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def rgb(colour: str) -> np.ndarray:
    """(3,) in [0, 1]."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def test_lines_and_outlines_of_every_method_stand_out_in_both_themes() -> None:
    """At least 3 to 1 against the paper (WCAG 1.4.11), for every colour that the figures use."""
    for paper, share, (edge, about) in shades():
        for colour in PALETTE:
            mixed = luminance(share * rgb(colour) + (1 - share) * rgb(edge))
            low, high = sorted((mixed, luminance(rgb(paper))))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, about)
