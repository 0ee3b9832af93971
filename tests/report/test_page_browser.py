"""The page in headless Chromium: without errors, by keyboard alone, in both themes, wide and narrow, offline."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.report.analysis import analyse
from harness.report.page import write
from harness.report.page.write import write_page
from harness.report.records import load_run
from tests.report.synthetic import Made, write_run
from tests.report.test_page import HOSTILE

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH")
WIDE, NARROW = (1400, 900), (360, 800)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms; one prompt is an attack; pictures of the first method's first seed along training."""
    texts = ("a cat", "a dog", HOSTILE[1], HOSTILE[3], *(f"animal {i}" for i in range(12)))
    gains = {("draft", "emoji-3d"): 3.4, ("draft", "object-accuracy"): -0.27, ("ddpo", "emoji-3d"): 0.4}
    made = Made(seeds=3, gains=gains, prompts={"training": ("a bee",), "held-out": texts})
    folder = write_run(tmp_path_factory.mktemp("browser") / "run", made)
    images = folder / "cells" / "draft--emoji-3d--seed0" / "images"
    for point in ("32", "128"):
        shutil.copytree(images / "final", images / point)
    return folder


@pytest.fixture(scope="module")
def page_file(run: Path, main_report: Path) -> Path:
    """The page of that run, around the text and figures of a whole report."""
    shutil.copytree(main_report, run / "report")
    write_page(analyse(load_run(run)), (main_report / "report.md").read_text(encoding="utf-8"), run / "report")
    return run / "report" / "report.html"


@pytest.fixture(scope="module")
def chromium() -> "Iterator[playwright.Browser]":
    """One browser for all tests."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page with everything that went wrong on it."""

    def __init__(self, browser: "playwright.Browser", path: Path, size: tuple[int, int], **options: object) -> None:
        size_of = {"width": size[0], "height": size[1]}
        self.context = browser.new_context(viewport=size_of, offline=True, reduced_motion="reduce", **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.wrong: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("requestfailed", lambda request: self.wrong.append(request.url[:200]))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(path.as_uri())

    def focused(self) -> str:
        """Name of the element that has the focus, as assistive technology has it."""
        return str(self.page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent"))

    def close(self) -> None:
        """End it."""
        self.context.close()


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessible_and_without_errors(
    chromium: "playwright.Browser", page_file: Path, theme: str, size: tuple[int, int]
) -> None:
    """No message, no request but the page itself, nothing wider than the window, and axe-core finds nothing."""
    opened = Opened(chromium, page_file, size, color_scheme=theme)
    page = opened.page
    for view in ("matrix", "curves", "price", "gains"):
        page.locator(f"input[value={view}]").dispatch_event("click")
        assert page.locator("#charts .panel").count() >= 2
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")
    found = axe.Axe().run(page)
    assert found.response["passes"]
    assert found.violations_count == 0, found.generate_report()
    page.locator("input[value=matrix]").dispatch_event("click")
    assert axe.Axe().run(page, context="#explorer").violations_count == 0
    assert opened.wrong == []
    assert [url for url in opened.requested if not url.startswith("data:")] == [page_file.as_uri()]
    opened.close()


def test_everything_can_be_reached_by_keyboard(chromium: "playwright.Browser", page_file: Path) -> None:
    """Switch a method off, change view and axis, walk to a point, open its pictures, scrub training with arrows."""
    opened = Opened(chromium, page_file, WIDE)
    page = opened.page
    keys = page.keyboard
    page.locator("input[name=view]:checked").focus()
    keys.press("ArrowRight")
    assert "Learning curves: 2 of 2 methods" in page.locator("#status").inner_text()
    before = page.locator("#charts .point").count()
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Space")
    assert "1 of 2 methods" in page.locator("#status").inner_text()
    assert 0 < page.locator("#charts .point").count() < before
    assert page.locator("#charts").inner_html().count("ddpo, seed") == 0
    for _ in range(20):
        if page.evaluate("document.activeElement.id") == "axis":
            break
        keys.press("Tab")
    assert "reward queries" in page.locator("#charts .axis-title").first.text_content()
    keys.press("ArrowDown")
    assert "denoiser rows" in page.locator("#charts .axis-title").first.text_content()
    keys.press("Tab")
    assert opened.focused().startswith("draft, seed 0, ")
    assert page.locator("#tip").inner_text() == opened.focused()
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    third = opened.focused()
    assert third.startswith("draft, seed 0, ")
    keys.press("End")
    assert opened.focused().startswith("draft, seed 2, ")
    keys.press("Home")
    keys.press("ArrowRight")
    keys.press("ArrowRight")
    assert opened.focused() == third
    keys.press("Enter")
    assert opened.focused() == "draft, seed 0"
    output = page.locator(".slider output")
    assert output.inner_text() == "after 128 queries"
    assert page.locator("#pairs .pair").count() == 12
    first = page.locator("#pairs .pair").first
    assert first.locator("img").evaluate_all("images => images.map((image) => image.alt)") == [
        "Base model: a cat",
        "draft, after 128 queries: a cat",
    ]
    assert first.locator("img").evaluate_all("images => images.every((image) => image.naturalWidth > 0)")
    assert not re.search("null|undefined|NaN", page.locator("#explorer").inner_text())
    keys.press("Tab")
    assert page.evaluate("document.activeElement.id") == "step"
    told = []
    for _ in range(4):
        keys.press("ArrowLeft")
        told.append(page.locator("#step").get_attribute("aria-valuetext"))
    assert told == ["after 32 queries", *["before training (base model)"] * 3]
    keys.press("End")
    assert output.inner_text() == "after 256 queries (final)"
    keys.press("Tab")
    keys.type("dog")
    assert page.locator("#pairs figcaption").all_inner_texts() == ["a dog"]
    assert opened.wrong == []
    opened.close()


def test_a_tables_columns_sort(chromium: "playwright.Browser", page_file: Path) -> None:
    """By number where there are numbers, up and down, told to assistive technology."""
    opened = Opened(chromium, page_file, WIDE)
    table = opened.page.locator("main table").first
    assert table.locator("tbody th").all_inner_texts() == ["base model", "draft", "ddpo"]
    head = table.locator("thead th").nth(1)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert table.locator("tbody th").all_inner_texts() == ["base model", "ddpo", "draft"]
    head.locator("button").click()
    assert table.locator("tbody th").all_inner_texts() == ["draft", "ddpo", "base model"]
    opened.close()


def test_prompts_are_shown_as_texts(chromium: "playwright.Browser", page_file: Path) -> None:
    """Markup is read, not obeyed; a text from right to left keeps to its box."""
    opened = Opened(chromium, page_file, WIDE)
    shown = opened.page.locator("#pairs figcaption").all_text_contents()
    assert shown[2] == HOSTILE[1]
    assert shown[3] == HOSTILE[3]
    assert "broken" not in opened.page.title()
    assert opened.wrong == []
    opened.close()


def test_pictures_outside_the_page_are_read_beside_it(
    chromium: "playwright.Browser", run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By relative path where the run's directory is; elsewhere the page says that it is not there."""
    monkeypatch.setattr(write, "LIMIT", 0)
    beside = run / "outside"
    beside.mkdir()
    write_page(analyse(load_run(run)), "# Title\n\n## Conclusions\n", beside)
    shutil.copy(beside / "report.html", tmp_path / "report.html")
    for path, text in ((beside / "report.html", ""), (tmp_path / "report.html", "not beside this page")):
        opened = Opened(chromium, path, WIDE)
        assert opened.page.locator("#pairs").count() == 0  # nothing is read before it is asked for
        opened.page.locator("#charts .point").first.press("Enter")
        half = opened.page.locator("#pairs .half").first
        if text:
            assert text in half.locator(".missing").inner_text()
        else:
            opened.page.wait_for_function("document.querySelector('#pairs img').naturalWidth === 64")
            assert opened.wrong == []
        opened.close()


def test_the_document_is_whole_without_javascript(chromium: "playwright.Browser", page_file: Path) -> None:
    """Tables and figures are there; what needs scripts is hidden, and the page says so."""
    opened = Opened(chromium, page_file, WIDE, java_script_enabled=False)
    assert opened.page.locator("main table:visible").count() > 5
    assert not opened.page.locator("#explorer").is_visible()
    assert "needs JavaScript" in opened.page.locator("noscript").inner_text()
    assert opened.wrong == []
    opened.close()
