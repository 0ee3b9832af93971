"""The report's Markdown as HTML: the same content in the same order, with sections, contents and embedded figures."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.token import Token

IMAGE = re.compile(r'(<img\b[^>]*?\bsrc=")([^"]*)(")')
BRACKETS = re.compile(r"\[[^\[\]<>]{1,40}\]")  # intervals stay on one line
PROSE = 48  # characters: a cell with more is read as sentences, and not squeezed into a narrow column
ALIGNED = "text-align:right"


@dataclass(frozen=True)
class Heading:
    """One entry of the contents."""

    level: int
    anchor: str
    text: str


@dataclass(frozen=True)
class Document:
    """A report in parts.

    Attributes:
        title: Plain text of the first heading.
        head: HTML up to the end of the conclusions: what stands before anything that can be explored.
        body: HTML of all that follows.
        headings: Second and third levels, in order.
    """

    title: str
    head: str
    body: str
    headings: tuple[Heading, ...]


def convert(text: str, source: Callable[[str], str]) -> Document:
    """Turn a report's Markdown, in which all texts from records are escaped already, into HTML.

    Args:
        text: The report; HTML in it is the report's own.
        source: What a picture's `src` becomes, given the one in the text.
    """
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(text)
    headings = _name_headings(tokens)
    parts = list(_arranged(tokens, headings))
    for token in parts:
        _embed(token, source)
    _label_tables(parts)
    starts = [i for i, token in enumerate(parts) if token.meta.get("section")]
    cut = starts[1] if len(starts) > 1 else len(parts)

    def rendered(chosen: list[Token]) -> str:
        return str(parser.renderer.render(chosen, parser.options, {}))

    title = next((h.text for h in headings.values() if h.level == 1), "Report")
    shown = tuple(h for h in headings.values() if h.level in (2, 3))
    return Document(title, rendered(parts[:cut]), rendered(parts[cut:]), shown)


def slug(text: str, taken: set[str]) -> str:
    """An id made of letters, digits and hyphens that no other heading has."""
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "section"
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


def _name_headings(tokens: list[Token]) -> dict[int, Heading]:
    """Give every heading an id; by place of its opening token."""
    taken: set[str] = {"explore", "contents", "top"}
    found: dict[int, Heading] = {}
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            plain = _plain(tokens[i + 1])
            anchor = slug(plain, taken)
            token.attrSet("id", anchor)
            found[i] = Heading(int(token.tag[1]), anchor, plain)
    return found


def _plain(inline: Token) -> str:
    """Text of a line without its markup."""
    return "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline"))


def _arranged(tokens: list[Token], headings: dict[int, Heading]) -> Iterator[Token]:
    """Sections around second-level headings, boxes around tables, and figures with the paragraph below as caption."""
    caption = opened = False
    for i, token in enumerate(tokens):
        heading = headings.get(i)
        if heading and heading.level == 2:
            if opened:
                yield _block("</section>")
            opened = True
            yield _block(f'<section aria-labelledby="{heading.anchor}">', section=True)
        if token.type == "table_open":
            yield _block('<div class="scroll" tabindex="0" role="group">', box=True)
        picture = token.type == "html_block" and token.content.lstrip().startswith("<img")
        if picture:
            following = tokens[i + 1].type if i + 1 < len(tokens) else ""
            caption = following == "paragraph_open"
            box = f'<div class="scroll picture" tabindex="0" role="group">{token.content}</div>'
            yield _block(f"<figure>{box}{'<figcaption>' if caption else '</figure>'}", figure=True)
            continue
        yield token
        if token.type == "table_close":
            yield _block("</div>")
        if token.type == "paragraph_close" and caption:
            yield _block("</figcaption></figure>")
            caption = False
    if opened:
        yield _block("</section>")


def _block(content: str, **meta: bool) -> Token:
    return Token("html_block", "", 0, content=f"{content}\n", meta=meta)


def _embed(token: Token, source: Callable[[str], str]) -> None:
    """Replace the sources of pictures, in HTML and in Markdown, and keep intervals on one line."""
    for part in (token, *(token.children or [])):
        if part.type in ("html_block", "html_inline"):
            part.content = IMAGE.sub(lambda m: m[1] + html.escape(source(html.unescape(m[2]))) + m[3], part.content)
        elif part.type == "image":
            part.attrSet("src", source(str(part.attrGet("src"))))
        elif part.type == "text":
            part.content = BRACKETS.sub(lambda found: found[0].replace(" ", "\u00a0"), part.content)


def _label_tables(tokens: list[Token]) -> None:
    """Header cells for rows and columns, alignment as a class, and a name for each box that scrolls."""
    title, tables, figures, first = "", 0, 0, False
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            title = _plain(tokens[i + 1])
        elif token.meta.get("box"):
            tables += 1
            label = html.escape(f"Table {tables}: {title}", quote=True)
            token.content = token.content.replace('role="group"', f'role="group" aria-label="{label}"', 1)
        elif token.meta.get("figure"):
            figures += 1
            token.content = token.content.replace('role="group"', f'role="group" aria-label="Figure {figures}"', 1)
        elif token.type == "tr_open":
            first = True
        elif token.type in ("th_open", "td_open"):
            if token.attrs.pop("style", "") == ALIGNED:
                token.attrSet("class", "number")
            elif len(tokens[i + 1].content) > PROSE:
                token.attrSet("class", "prose")
            if token.type == "th_open":
                token.attrSet("scope", "col")
            elif first:
                token.tag, token.attrs["scope"] = "th", "row"
                close = next(t for t in tokens[i:] if t.type == "td_close")
                close.tag = "th"
            first = False
