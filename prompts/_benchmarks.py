"""What the suites of published benchmarks share: reading the user's own copy of texts that are not shipped.

`--suite NAME=PATH` says where the copy is; `NAME=PATH@HASH` also what it must be: the start, at least 12 digits, of
the file's sha256, or for a directory of the sha256 of what `sha256sum` prints for its files in alphabetical order. The
first 12 digits are the suite's version, so reports and records show what to write.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

from harness.errors import UserError
from harness.prompts import Prompt

PINNED = re.compile(r"(.+)@([0-9a-f]{12,64})")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair, which JSON can say, cannot be written again


@dataclass(frozen=True)
class Contents:
    """A copy that was read.

    Attributes:
        files: Their bytes, by path.
        version: Start of the hash.
    """

    files: Mapping[Path, bytes]
    version: str


@dataclass(frozen=True)
class Benchmark:
    """A published list of prompts.

    Attributes:
        name: Of the suite.
        layout: What the copy is, in words.
        where: Where it is published.
        licence: Of the texts.
    """

    name: str
    layout: str
    where: str
    licence: str

    def read(self, given: str | None, files: Callable[[Path], Sequence[Path]]) -> Contents:
        """The user's copy.

        Args:
            given: What follows `NAME=`; None where the user gave the name alone.
            files: Which files the copy at a path consists of.

        Raises:
            UserError: It is missing, cannot be read, or is not what its hash says.
        """
        if given is None:
            raise self.error("its texts are not shipped")
        match = PINNED.fullmatch(given)
        place, pin = (match[1], match[2]) if match else (given, "")
        path = Path(place).expanduser()
        if not path.exists():
            raise self.error(f"there is no {path}")
        try:
            contents = {file: file.read_bytes() for file in files(path)}
        except OSError as error:
            raise self.error(f"cannot read {error.filename or path}: {error.strerror}") from None
        digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        if path not in digests and not path.is_dir():
            raise self.error(f"{path} is no directory")
        if path.is_dir():
            listing = "".join(f"{digests[file]}  {file.name}\n" for file in sorted(digests, key=lambda f: f.name))
            digest = hashlib.sha256(listing.encode()).hexdigest()
        else:
            digest = digests[path]
        if not digest.startswith(pin):
            raise UserError(
                f"the suite {self.name}: {path} is not the copy asked for: its hash is {digest}, not {pin}...; take "
                "the other copy, or leave out what follows the @"
            )
        return Contents(contents, digest[:12])

    def error(self, reason: str) -> UserError:
        """What is wrong with the copy, and how to get one."""
        return UserError(
            f"the suite {self.name}: {reason}. Give your own copy as --suite {self.name}=PATH: {self.layout}. It is "
            f"published at {self.where} ({self.licence}); see docs/prompts.md"
        )

    def text(self, path: Path, content: bytes) -> str:
        """The text of a file.

        Raises:
            UserError: It is not UTF-8.
        """
        try:
            return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{path} is not UTF-8") from None

    def prompt_text(self, raw: object, place: str) -> str:
        """A prompt as published, except that line breaks and other control characters become one blank.

        Raises:
            UserError: It is no text, or empty.
        """
        text = CONTROL.sub(" ", raw).strip() if isinstance(raw, str) else ""
        if not text or SURROGATE.search(text):
            raise self.error(f"{place}: expected a prompt, found {raw!r:.60}")
        return text

    def rows(self, path: Path, content: bytes, delimiter: str, *, quoted: bool) -> list[dict[str, str]]:
        """The rows of a table, by the lower-case names of its first line.

        Args:
            path: For messages.
            content: The file.
            delimiter: Between columns.
            quoted: Whether quotation marks enclose fields, or belong to the texts.

        Raises:
            UserError: It is no table, or a row has more or fewer fields than the first line.
        """
        lines = io.StringIO(self.text(path, content), newline="")
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        try:
            table = [row for row in csv.reader(lines, delimiter=delimiter, quoting=quoting) if any(map(str.strip, row))]
        except csv.Error as error:
            raise self.error(f"{path} is no table ({error})") from None
        header = [name.strip().lower() for name in table[0]] if table else []
        for number, row in enumerate(table[1:], 2):
            if len(row) != len(header):
                raise self.error(f"{path}, row {number}: {len(row)} columns instead of {len(header)}")
        return [dict(zip(header, row, strict=True)) for row in table[1:]]


def balanced(prompts: Sequence[Prompt], label: str) -> tuple[Prompt, ...]:
    """One prompt of each value of a label in turn, so that the first prompts of the list have all of them."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.metadata.get(label, ""), []).append(prompt)
    return tuple(prompt for turn in zip_longest(*groups.values()) for prompt in turn if prompt is not None)
