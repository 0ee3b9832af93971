"""Write `report.html` from the report's text and the numbers behind it."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

import jinja2

from harness.report.analysis import Analysis
from harness.report.page.album import collect
from harness.report.page.document import Document, convert
from harness.report.page.explorer import explorer, script_json
from harness.report.page.figures import embedder

TEMPLATES = Path(__file__).parents[1] / "templates"
PAGE = "report.html"
LIMIT = 9_500_000  # bytes of the page
NUMBERS = 2_000_000  # of these for the explorer's numbers, which a full grid needs half of
PICTURES = 3_000_000  # at most, before base64


def write_page(analysis: Analysis, text: str, folder: Path) -> None:
    """Write the page beside the report whose Markdown is `text` and whose figures lie in `folder` already.

    Nothing is fetched when it is opened: style, script, figures and a bounded number of pictures are inside; other
    pictures are read from the run's directory by their relative path. The same records give the same bytes, as long as
    the report lies at the same place relative to the run.
    """
    document = convert(text, embedder(folder))
    album = collect(analysis, _room(document))
    root = Path(os.path.relpath(analysis.run.folder.resolve(), folder.resolve())).as_posix()
    data = explorer(analysis, album, root)
    _write(document, folder, script_json(data) if data else "", album.statement)


def write_plain_page(text: str, folder: Path) -> None:
    """Write the page of a text with figures alone: nothing can be chosen in it."""
    _write(convert(text, embedder(folder)), folder)


def _write(document: Document, folder: Path, data: str = "", pictures: str = "") -> None:
    style, script = _file("page.css"), _file("page.js")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("page.html.j2").render(
        document=document,
        style=style,
        script=script,
        policy=_policy(style, script),
        explorer=data,
        pictures=pictures,
    )
    (folder / PAGE).write_text(page, encoding="utf-8", newline="\n")


def _room(document: Document) -> int:
    """Bytes for pictures inside the page, before base64 makes four of three."""
    left = LIMIT - NUMBERS - len(document.head.encode()) - len(document.body.encode())
    return min(PICTURES, max(left, 0) * 3 // 4)


def _file(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Content security policy: this style, this script, and pictures of the page or beside it; nothing else."""
    sources = {"style-src": style, "script-src": script}
    rules = [f"{kind} 'sha256-{_digest(content)}'" for kind, content in sources.items()]
    return "; ".join(
        ["default-src 'none'", *rules, "img-src 'self' file: data:", "base-uri 'none'", "form-action 'none'"]
    )


def _digest(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
