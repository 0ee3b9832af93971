"""A user's own prompts: a `.txt` file with one prompt a line, or a `.jsonl` file with one object a line.

A line of JSON has `text`, optionally `id` and `split` (`training`, `validation`, `held-out`), and any other keys,
which become the prompt's metadata (`object`, `colour`...). UTF-8; blank lines are skipped.

Where no line names a split, the prompts are ranked by the sha256 of their text: the first fifth (rounded down, at
least one of two or more) is held out, the next tenth (rounded down) validates, the others are trained on, in the
order of the file. So the split depends neither on chance nor on the order of the lines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.prompts import SPLITS, Prompt, PromptSuite

ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class _Entry:
    line: int
    prompt: Prompt
    split: str | None


def load(path: Path) -> PromptSuite:
    """Read a suite: named as the file without its ending, the version being the start of the content's sha256.

    Raises:
        UserError: The file cannot be read, or a line of it cannot be used; says which line, and what to do.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the prompts {path}: {error.strerror}; give the path of a .txt or .jsonl file"
        ) from (error)
    kind = path.suffix.lower()
    if kind not in {".txt", ".jsonl"}:
        raise UserError(
            f"{path}: prompts come as .txt (one prompt a line) or .jsonl (one JSON object a line), not {kind or 'this'}"
        )
    entries = [
        _from_json(path, line, text) if kind == ".jsonl" else _Entry(line, _prompt(path, line, text, {}), None)
        for line, text in _lines(path, content)
    ]
    _check(path, entries)
    chosen = _assign(entries)
    return PromptSuite(
        name=path.stem,
        version=hashlib.sha256(content).hexdigest()[:12],
        training=tuple(entry.prompt for entry in entries if chosen[entry.line] == "training"),
        validation=tuple(entry.prompt for entry in entries if chosen[entry.line] == "validation"),
        held_out=tuple(entry.prompt for entry in entries if chosen[entry.line] == "held-out"),
        licence="the user's own",
    )


def id_of(text: str) -> str:
    """An id for a text: its first words and the start of its sha256."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-")
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:8]}".strip("-")


def ranked(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts by the sha256 of their texts: an order that depends neither on chance nor on that of a file."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.text.encode()).hexdigest())


def _lines(path: Path, content: bytes) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and texts of the lines that are not blank."""
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number}: not UTF-8; save the file in that encoding") from error
        if text:
            yield number, text


def _from_json(path: Path, line: int, text: str) -> _Entry:
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
        # Half a surrogate pair and numbers beyond floats can be read, but not written again.
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'{path}, line {line}: not JSON ({error}); write one object a line, such as {{"text": "a fox"}}'
        ) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
        raise UserError(f'{path}, line {line}: needs an object with a "text" that is a string, as {{"text": "a fox"}}')
    split = fields.pop("split", None)
    if split is not None and split not in SPLITS:
        raise UserError(f"{path}, line {line}: unknown split {split!r}; use one of {', '.join(SPLITS)}, or none at all")
    return _Entry(line, _prompt(path, line, fields.pop("text"), fields), split)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _prompt(path: Path, line: int, text: str, fields: dict[str, Any]) -> Prompt:
    """The prompt of one line; without an id, one is made of the text."""
    text = text.strip()
    if not text or not text.isprintable():
        raise UserError(f"{path}, line {line}: the prompt is empty or has control characters; write plain text")
    name = fields.pop("id", None)
    if name is None:
        name = id_of(text)
    if not isinstance(name, str) or not ID.fullmatch(name):
        raise UserError(
            f"{path}, line {line}: the id {name!r} cannot name files; use up to 100 letters, digits, dashes, "
            "underscores and dots (a string, no dot first), or leave it out"
        )
    return Prompt(name, text, fields)


def _check(path: Path, entries: list[_Entry]) -> None:
    """Refuse an empty file, repeated ids or texts, and splits on some lines only."""
    if not entries:
        raise UserError(f"{path} holds no prompts; write one a line")
    seen: dict[tuple[str, str], int] = {}
    for entry in entries:
        # Ids name files, and some file systems do not tell cases apart.
        for what, value in (("text", entry.prompt.text), ("id", entry.prompt.id.lower())):
            if (first := seen.setdefault((what, value), entry.line)) != entry.line:
                raise UserError(
                    f"{path}, line {entry.line}: the same {what} as on line {first} ({value!r}); remove one"
                    + (" or change its id" if what == "id" else "")
                )
    named = [entry for entry in entries if entry.split is not None]
    if named and len(named) < len(entries):
        line = next(entry.line for entry in entries if entry.split is None)
        raise UserError(
            f'{path}, line {line}: no "split", though line {named[0].line} has one; give all lines one, or none'
        )
    if named and all(entry.split != "training" for entry in named):
        raise UserError(f'{path}: no line has "split": "training"; give at least one')


def _assign(entries: list[_Entry]) -> dict[int, str]:
    """The split of every line."""
    if entries[0].split is not None:
        return {entry.line: str(entry.split) for entry in entries}
    held_out = max(len(entries) // 5, 1 if len(entries) > 1 else 0)
    validation = len(entries) // 10
    lines = {entry.prompt.id: entry.line for entry in entries}
    names = ["held-out"] * held_out + ["validation"] * validation
    names += ["training"] * (len(entries) - len(names))
    order = ranked(entry.prompt for entry in entries)
    return {lines[prompt.id]: name for prompt, name in zip(order, names, strict=True)}
