"""A user's own prompts: what is read, how it is split, and what is said of files that cannot be used."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.prompts import SPLITS, PromptSuite
from prompts._files import load


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A file with this content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(suite: PromptSuite) -> dict[str, list[str]]:
    """The texts of each split."""
    return {split: [prompt.text for prompt in suite.split(split)] for split in SPLITS}


def test_text_lines_become_prompts(tmp_path: Path) -> None:
    """Blank lines, a byte-order mark and Windows line ends do not matter; ids are stable and name files."""
    plain = load(write(tmp_path, "mine.txt", "a fox\n\na crab in the snow\n"))
    windows = load(write(tmp_path, "other.txt", b"\xef\xbb\xbfa fox\r\n  \r\na crab in the snow"))
    assert plain.name == "mine"
    assert texts(plain) == texts(windows)
    assert sorted(text for split in texts(plain).values() for text in split) == ["a crab in the snow", "a fox"]
    assert {p.id for p in plain.training + plain.held_out} == {p.id for p in windows.training + windows.held_out}
    assert any(prompt.id.startswith("a-fox-") for prompt in plain.training + plain.held_out)


def test_json_lines_keep_ids_splits_and_metadata(tmp_path: Path) -> None:
    """Keys other than text, id and split are the metadata; the order of lines is kept."""
    lines = [
        {"text": "a fox", "id": "f1", "split": "training", "object": "fox"},
        {"text": "an owl", "split": "held-out", "colour": "blue", "weight": 2},
        {"text": "a crab", "split": "training"},
        {"text": "a bat", "split": "validation"},
    ]
    suite = load(write(tmp_path, "mine.jsonl", "\n".join(map(json.dumps, lines))))
    assert texts(suite) == {"training": ["a fox", "a crab"], "validation": ["a bat"], "held-out": ["an owl"]}
    assert suite.training[0].id == "f1"
    assert suite.training[0].metadata == {"object": "fox"}
    assert suite.held_out[0].metadata == {"colour": "blue", "weight": 2}


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (9, (8, 0, 1)), (50, (35, 5, 10))])
def test_split_by_rank(tmp_path: Path, count: int, sizes: tuple[int, int, int]) -> None:
    """A fifth is held out and a tenth validates, whatever the order of the lines."""
    lines = [f"prompt number {i}" for i in range(count)]
    forth = load(write(tmp_path, "forth.txt", "\n".join(lines)))
    back = load(write(tmp_path, "back.txt", "\n".join(lines[::-1])))
    assert tuple(len(forth.split(split)) for split in SPLITS) == sizes
    assert {k: sorted(v) for k, v in texts(forth).items()} == {k: sorted(v) for k, v in texts(back).items()}
    assert forth.training == back.training[::-1]


def test_version_follows_the_content(tmp_path: Path) -> None:
    """The same bytes have the same version, other bytes another one."""
    one, same = (load(write(tmp_path, name, "a fox\nan owl")) for name in ("a.txt", "b.txt"))
    other = load(write(tmp_path, "c.txt", "a fox\nan eagle"))
    assert one.version == same.version != other.version
    assert one.sha256 == same.sha256 != other.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds no prompts; write one a line"),
        ("a.txt", "\n  \n", "holds no prompts"),
        ("a.txt", b"a fox\n\xff\xfe", "line 2: not UTF-8"),
        ("a.txt", "a fox\nan owl\na fox", "line 3: the same text as on line 1"),
        ("a.txt", "a\x00fox", "line 1: the prompt is empty or has control"),
        ("a.csv", "a fox", r"\.txt .* or \.jsonl .*, not \.csv"),
        ("a.jsonl", '{"text": "a fox"}\n{"text": "an', "line 2: not JSON"),
        ("a.jsonl", '"a fox"', 'line 1: needs an object with a "text"'),
        ("a.jsonl", '{"text": 3}', 'line 1: needs an object with a "text"'),
        ("a.jsonl", '{"prompt": "a fox"}', 'line 1: needs an object with a "text"'),
        ("a.jsonl", '{"text": " "}', "line 1: the prompt is empty"),
        ("a.jsonl", '{"text": "a\\ud800"}', "line 1: not JSON"),
        ("a.jsonl", '{"text": "a", "weight": 1e999}', "line 1: not JSON"),
        ("a.jsonl", '{"text": "a fox", "weight": NaN}', "line 1: not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", '{"text": "a fox", "id": "../x"}', "line 1: the id '../x' cannot name files"),
        ("a.jsonl", '{"text": "a fox", "id": 7}', "line 1: the id 7 cannot name files"),
        ("a.jsonl", '{"text": "a fox", "split": "test"}', "line 1: unknown split 'test'; use one of training"),
        ("a.jsonl", '{"text": "a", "split": []}', r"line 1: unknown split \[\]"),
        ("a.jsonl", '{"text": "a", "id": "x"}\n\n{"text": "b", "id": "X"}', "line 3: the same id as on line 1"),
        ("a.jsonl", '{"text": "a", "split": "training"}\n{"text": "b"}', 'line 2: no "split", though line 1 has one'),
        ("a.jsonl", '{"text": "a", "split": "held-out"}', 'no line has "split": "training"'),
    ],
)
def test_unusable_files_are_explained(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    """The message names the line and what to do."""
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, name, content))


def test_files_that_cannot_be_read_are_explained(tmp_path: Path) -> None:
    """A missing file and a folder."""
    for path in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(UserError, match=r"cannot read the prompts .*; give the path"):
            load(path)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), kind=st.sampled_from(["txt", "jsonl"]))
@example(content=b'{"text": "\\u2028", "a": 1e999}', kind="jsonl")
@example(content=b'{"text": "a", "b": "\\ud800"}', kind="jsonl")
@example(content=b'{"text": "a", "b": ' + b"9" * 5000 + b"}", kind="jsonl")
def test_any_bytes_make_a_suite_or_an_explained_error(content: bytes, kind: str) -> None:
    """No other exception, and what is read has a hash and disjoint splits."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            suite = load(write(Path(folder), f"a.{kind}", content))
        except UserError:
            return
    prompts = [prompt for split in SPLITS for prompt in suite.split(split)]
    assert len({prompt.id for prompt in prompts}) == len(prompts) > 0
    assert len(suite.training) > 0
    assert len(suite.sha256) == 64
