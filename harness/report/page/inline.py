"""Which evaluated pictures stand inside the page, and which are read from the run's folder."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from harness.report.page.figures import webp

PROMPTS = 40
SIDE = 192


@dataclass(frozen=True)
class Stored:
    """A picture that the run kept: of which cell, at which point of training, for which prompt (by its place)."""

    cell: str
    point: str
    prompt: int


@dataclass(frozen=True)
class Group:
    """Pictures that are taken together or not at all: one prompt's, of one kind."""

    kind: str
    pictures: tuple[Stored, ...]


@dataclass(frozen=True)
class Inlined:
    """The pictures inside the page.

    Attributes:
        pictures: Base64 of a WebP of at most `SIDE` pixels a side.
        prompts: For each kind, of how many prompts.
    """

    pictures: dict[Stored, str]
    prompts: dict[str, int]


def inline(groups: Sequence[Group], file: Callable[[Stored], Path], *, budget: int) -> Inlined:
    """Take groups in their order until the next one would exceed the budget.

    Args:
        groups: What to take, most wanted first.
        file: Where a picture is. One that cannot be read stays outside.
        budget: Bytes before base64.
    """
    taken: dict[Stored, str] = {}
    counts = dict.fromkeys((group.kind for group in groups), 0)
    spent = 0
    for group in groups:
        encoded = _encoded((stored for stored in group.pictures if stored not in taken), file)
        size = sum(map(len, encoded.values()))
        if spent + size > budget:
            break
        spent += size
        counts[group.kind] += bool(encoded)
        taken |= {stored: base64.b64encode(content).decode() for stored, content in encoded.items()}
    return Inlined(taken, counts)


def _encoded(wanted: Iterable[Stored], file: Callable[[Stored], Path]) -> dict[Stored, bytes]:
    result: dict[Stored, bytes] = {}
    for stored in wanted:
        try:
            with Image.open(file(stored)) as picture:
                small = picture.convert("RGB")
        except OSError:  # also a file that is no picture; it is linked, and the page says that it cannot be shown
            continue
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        result[stored] = webp(small, quality=80)
    return result
