"""Figures of the report as `data:` addresses, within a stated number of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

VECTOR = 300_000  # bytes: a larger drawing is embedded as the picture of it
TOTAL = 2_600_000
WEBP_SIDE = 16_383  # the format's limit


def embedder(folder: Path) -> Callable[[str], str]:
    """What stands in the page for each figure's file: its bytes, or its name once they are too many.

    Drawings stay drawings (SVG) where they are small; pictures are compressed. Files that are not in the folder keep
    their address.
    """
    spent = 0
    known: dict[str, str] = {}

    def source(name: str) -> str:
        nonlocal spent
        if name not in known:
            path = folder / name
            if Path(name).name != name or path.suffix != ".png" or not path.is_file():
                return name
            kind, content = _smallest(path)
            if spent + len(content) > TOTAL:
                known[name] = name
            else:
                spent += len(content)
                known[name] = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        return known[name]

    return source


def _smallest(path: Path) -> tuple[str, bytes]:
    vector = path.with_suffix(".svg")
    if vector.is_file():
        if vector.stat().st_size <= VECTOR:
            return "image/svg+xml", vector.read_bytes()
        return "image/png", path.read_bytes()
    with Image.open(path) as picture:
        if max(picture.size) > WEBP_SIDE:
            return "image/png", path.read_bytes()
        return "image/webp", webp(picture.convert("RGB"), quality=85)


def webp(picture: Image.Image, *, quality: int) -> bytes:
    """Compressed with loss."""
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=quality, method=2)
    return content.getvalue()
