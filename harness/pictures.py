"""Pictures from files: which ones, of which prompt, and their pixels in whatever mode they were saved."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError
from harness.prompts import Prompt

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
PROMPTS_FORMAT = (
    "a .csv file with the columns file and prompt, a .jsonl file with an object of file and prompt a line, or a .txt "
    "file with the prompt of each picture in turn"
)


@dataclass(frozen=True)
class Picture:
    """A file and what it was meant to show.

    Attributes:
        path: The file.
        prompt: Its id depends on the text and the labels alone.
    """

    path: Path
    prompt: Prompt


def read_pictures(paths: Sequence[Path], prompts: Path | str | None) -> list[Picture]:
    """The pictures in files and folders, with their prompts; no pixel is read.

    Args:
        paths: Files in any format that Pillow reads, and folders, of which all pictures are taken, those of folders
            within included, by name (`9.png` before `10.png`).
        prompts: A text is the prompt of all. A path is a file that maps pictures to prompts: `.csv` with the columns
            `file` and `prompt`, or `.jsonl` with an object of these a line; further columns or keys become the
            prompt's labels. `file` is a name, or as much of the end of the path as tells pictures apart; the longest
            fit counts, and entries of other pictures do not matter. In a `.txt` file the n-th line is the prompt of the
            n-th picture.

    Raises:
        UserError: A path does not exist, nothing was found, or a picture has no prompt.
    """
    files = _files(paths)
    if prompts is None:
        raise UserError(
            f"what are the pictures of? Give --prompts FILE: {PROMPTS_FORMAT}; or --prompt TEXT for all of them (an "
            "empty one where no reward reads it)"
        )
    if isinstance(prompts, str):
        return [Picture(file, _prompt(prompts, {})) for file in files]
    if prompts.suffix.lower() == ".txt":
        lines = _text(prompts).rstrip("\r\n").split("\n")
        if len(lines) != len(files):
            raise UserError(f"{prompts} has {len(lines)} lines for {len(files)} pictures; write one for each, in order")
        return [Picture(file, _prompt(line.strip(), {})) for file, line in zip(files, lines, strict=True)]
    entries = _entries(prompts)
    return [Picture(file, _find(entries, file, prompts)) for file in files]


def load_picture(path: Path) -> NDArray[np.uint8]:
    """The pixels of a file, 8-bit RGB (H, W, 3).

    Turned as its EXIF orientation says. Transparent pixels are shown on white. Greyscale and palettes become RGB;
    of 16 bits of grey the 8 nearest are taken, of colour the higher 8, as Pillow reads them. Colour profiles are not
    applied: pixels count as sRGB. Of a JPEG with further pictures in it, as some cameras write, the first is taken.

    Raises:
        UserError: It is no picture, is cut off, has several frames, or has values without a defined range.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # a camera's JPEG with its preview behind it
                raise UserError(f"{path} has {frames} frames; save the one to score as a picture of its own")
            upright = ImageOps.exif_transpose(picture)
            if upright.mode in ("I", "F"):
                raise UserError(
                    f"{path} has 32-bit values ({upright.mode}) of unknown range; save it with 8 or 16 bits"
                )
            if upright.mode.startswith("I;16"):
                levels = (np.asarray(upright).astype(np.float64) / 257).round().astype(np.uint8)
                return np.repeat(levels[:, :, None], 3, axis=2)
            if upright.has_transparency_data:
                layers = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
            return np.array(upright.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds
        raise UserError(f"{path} cannot be read as a picture: {error}; leave it out or save it again") from None


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
            if not inside:
                raise UserError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
            found += sorted(inside, key=_natural)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"there is no picture or folder {path}")
    if not found:
        raise UserError("no pictures are given; name files or folders")
    return list(dict.fromkeys(found))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts digits as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]


def _prompt(text: str, labels: dict[str, Any]) -> Prompt:
    content = json.dumps([text, labels], sort_keys=True, ensure_ascii=False)
    return Prompt(hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16], text, labels)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the prompts {path}: {error.strerror}; give {PROMPTS_FORMAT}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save the file in that encoding") from None


def _entries(path: Path) -> dict[tuple[str, ...], Prompt]:
    """Prompts by the parts of the file names of a .csv or .jsonl file."""
    match path.suffix.lower():
        case ".csv":
            rows = _csv_rows(path)
        case ".jsonl":
            rows = _json_rows(path)
        case other:
            raise UserError(f"{path}: prompts of pictures come in {PROMPTS_FORMAT}, not {other or 'this'}")
    entries: dict[tuple[str, ...], Prompt] = {}
    for place, row in rows:
        name, text = row.pop("file", None), row.pop("prompt", None)
        if not isinstance(name, str) or not isinstance(text, str) or not name:
            raise UserError(f"{path}, {place}: needs a file and a prompt, both text")
        parts = tuple(part for part in Path(name).parts if part != ".")
        if parts in entries:
            raise UserError(f"{path}, {place}: {name} comes twice; remove one")
        entries[parts] = _prompt(text.strip(), row)
    return entries


def _csv_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        rows = [(f"line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: no CSV ({error})") from None
    for place, row in rows:
        if None in row or None in row.values():
            raise UserError(f"{path}, {place}: other columns than the first line; enclose commas in quotation marks")
    return [(place, {key: value for key, value in row.items() if value or key == "prompt"}) for place, row in rows]


def _json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: needs an object with file and prompt")
        rows.append((f"line {number}", row))
    return rows


def _find(entries: dict[tuple[str, ...], Prompt], file: Path, prompts: Path) -> Prompt:
    """The prompt of the entry that fits the longest end of a path."""
    for parts in (file.parts, file.absolute().parts):
        for start in range(len(parts)):
            if parts[start:] in entries:
                return entries[parts[start:]]
    raise UserError(f"{prompts} has no prompt for {file}; add a line for it")
