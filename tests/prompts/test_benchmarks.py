"""Benchmarks from a user's copy: what is read, what is checked, and what is said of copies that do not fit."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.config import resolve
from harness.errors import UserError
from harness.grid import Grid
from harness.prompts import SPLITS, PromptSuite
from harness.registry import discover, load_suite

STYLES = ("anime", "concept-art", "paintings", "photo")


def texts(suite: PromptSuite, split: str) -> list[str]:
    """The texts of a split."""
    return [prompt.text for prompt in {s: suite.split(s) for s in SPLITS}[split]]


def hpdv2(folder: Path, count: int = 800) -> Path:
    """The benchmark's four files."""
    folder.mkdir(exist_ok=True)
    for style in STYLES:
        lines = [f"{style} of a café number {i}" for i in range(count)]
        (folder / f"{style}.json").write_text(json.dumps(lines), encoding="utf-8")
    return folder


def drawbench(path: Path, count: int = 200, repeats: int = 1) -> Path:
    """A table with two categories, or a list of lines, with every prompt several times."""
    prompts = [f'A "{i}", in yellow — on a wall.' for i in range(count)] * repeats
    if path.suffix == ".txt":
        path.write_text("\r\n".join(prompts) + "\n\n", encoding="utf-8")
    else:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["Prompts", "Category"])
        writer.writerows([prompt, "Colors" if i % 200 < 150 else "Text"] for i, prompt in enumerate(prompts))
        path.write_text(table.getvalue(), encoding="utf-8")
    return path


def parti(path: Path, count: int = 1632) -> Path:
    """A table as published: tabs, and quotation marks that enclose nothing."""
    rows = [f"a fox number {i}\tAnimals\tBasic\t" for i in range(count - 2)]
    rows += ['"G O" painted on a wall\tArts\tWriting & Symbols\t', "l'été — naïve\tArts\tStyle & Format\tDALL-E"]
    path.write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows]) + "\n", encoding="utf-8")
    return path


def pick_a_pic(folder: Path) -> Path:
    """Lists of lines."""
    folder.mkdir(exist_ok=True)
    lines = {"train": ["a fox", "an owl", "A Crab", "a fox"], "validation": ["an OWL", "a bat"], "test": ["a crab"]}
    for name, prompts in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts), encoding="utf-8")
    return folder


def test_hpdv2_has_its_styles_in_turn(tmp_path: Path) -> None:
    """3200 held-out prompts, each with its style and its place; nothing to train on without `train.json`."""
    suite = load_suite(f"hpdv2={hpdv2(tmp_path)}")
    assert [len(suite.split(split)) for split in SPLITS] == [0, 0, 3200]
    assert [prompt.metadata["style"] for prompt in suite.held_out[:8]] == [*STYLES, *STYLES]
    for prompt in suite.held_out:
        style, index = prompt.metadata["style"], prompt.metadata["index"]
        assert (prompt.id, prompt.text) == (f"{style}-{index:03}", f"{style} of a café number {index}")


def test_hpdv2_trains_on_what_is_not_evaluated(tmp_path: Path) -> None:
    """The data set's own prompts, each once; an evaluated one is left out, whatever its case."""
    pairs = [{"prompt": f"prompt {i % 100}", "human_preference": [1, 0]} for i in range(300)]
    evaluated = [{"prompt": "Anime of a CAFÉ number 7"}]
    hpdv2(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(pairs + evaluated), encoding="utf-8")
    suite = load_suite(f"hpdv2={tmp_path}")
    assert (len(suite.training), len(suite.validation)) == (95, 5)
    assert {*texts(suite, "training"), *texts(suite, "validation")} == {f"prompt {i}" for i in range(100)}

    (tmp_path / "train.json").write_text(json.dumps(pairs[::-1]), encoding="utf-8")
    assert load_suite(f"hpdv2={tmp_path}").training == suite.training  # no order of the file matters


@pytest.mark.parametrize("name", ["DrawBench.csv", "test.txt"])
def test_drawbench_takes_each_prompt_once(tmp_path: Path, name: str) -> None:
    """Commas, quotation marks and dashes stay; categories come in turn; ids are the same for both formats."""
    suite = load_suite(f"drawbench={drawbench(tmp_path / name, repeats=5)}")
    assert sorted(texts(suite, "held-out")) == sorted(f'A "{i}", in yellow — on a wall.' for i in range(200))
    assert not suite.training + suite.validation
    other = load_suite(f"drawbench={drawbench(tmp_path / 'other.csv')}")
    assert {prompt.id for prompt in suite.held_out} == {prompt.id for prompt in other.held_out}
    assert [prompt.metadata["category"] for prompt in other.held_out[:4]] == ["Colors", "Text", "Colors", "Text"]


def test_partiprompts_keeps_every_row_and_its_quotation_marks(tmp_path: Path) -> None:
    """Ids are rows; a field that begins with a quotation mark is no quoted field."""
    suite = load_suite(f"partiprompts={parti(tmp_path / 'PartiPrompts.tsv')}")
    prompts = {prompt.id: prompt for prompt in suite.held_out}
    assert set(prompts) == {f"parti-{i:04}" for i in range(1, 1633)}
    assert prompts["parti-1631"].text == '"G O" painted on a wall'
    assert prompts["parti-1632"].metadata == {"category": "Arts", "challenge": "Style & Format", "note": "DALL-E"}
    assert "note" not in prompts["parti-0001"].metadata
    assert {prompt.metadata["category"] for prompt in suite.held_out[:2]} == {"Animals", "Arts"}


def test_pick_a_pic_has_no_text_in_two_splits(tmp_path: Path) -> None:
    """A text of a later split, in whatever case, is in no earlier one; none occurs twice."""
    suite = load_suite(f"pick-a-pic={pick_a_pic(tmp_path)}")
    assert {split: sorted(texts(suite, split)) for split in SPLITS} == {
        "training": ["a fox"],
        "validation": ["a bat", "an OWL"],
        "held-out": ["a crab"],
    }


def test_pick_a_pic_reads_captions_of_parquet(tmp_path: Path) -> None:
    """Several files of a split; its selection for evaluation, not all pairs; control characters become blanks."""
    for name, captions in {
        "train-00000-of-00002": ["a fox", "", None],
        "train-00001-of-00002": ["an owl\nat night"],
        "test_unique-00000-of-00001": ["a crab"],
        "test-00000-of-00001": ["a pair's prompt"],
    }.items():
        pq.write_table(pa.table({"caption": captions, "user_id": [1] * len(captions)}), tmp_path / f"{name}.parquet")
    suite = load_suite(f"pick-a-pic={tmp_path}")
    assert sorted(texts(suite, "training")) == ["a fox", "an owl at night"]
    assert texts(suite, "held-out") == ["a crab"]


def test_the_copy_is_checked_against_its_hash(tmp_path: Path) -> None:
    """By the file's sha256, for a directory by that of its listing; the version is how the hash starts."""
    file = drawbench(tmp_path / "DrawBench.csv")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_suite(f"drawbench={file}@{digest}").version == digest[:12]
    assert load_suite(f"drawbench={file}@{digest[:12]}") == load_suite(f"drawbench={file}")
    with pytest.raises(UserError, match=f"not the copy asked for: its hash is {digest}, not 0123456789ab"):
        load_suite(f"drawbench={file}@0123456789ab")

    folder = hpdv2(tmp_path / "benchmark")
    lines = [f"{hashlib.sha256((folder / f'{s}.json').read_bytes()).hexdigest()}  {s}.json\n" for s in STYLES]
    version = hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
    assert load_suite(f"hpdv2={folder}@{version}").version == version
    (folder / "photo.json").write_text(json.dumps(["a fox"] * 800))
    with pytest.raises(UserError, match="not the copy asked for"):
        load_suite(f"hpdv2={folder}@{version}")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("hpdv2", lambda p: hpdv2(p / "x", 799), "anime.json has 799 prompts instead of 800"),
        ("hpdv2", lambda p: p, "cannot read .*anime.json: No such file"),
        ("hpdv2", lambda p: _changed(hpdv2(p) / "photo.json", b"[1"), "photo.json is not JSON"),
        ("hpdv2", lambda p: _changed(hpdv2(p) / "photo.json", b"{}"), "photo.json is no list"),
        (
            "hpdv2",
            lambda p: _changed(hpdv2(p) / "photo.json", b'["a"' + b', "\\ud800"' * 799 + b"]"),
            "entry 1: expected",
        ),
        (
            "hpdv2",
            lambda p: _changed(hpdv2(p) / "train.json", b'[{"text": "a"}]'),
            "train.json, entry 0: expected a pr",
        ),
        ("drawbench", lambda p: drawbench(p / "a.csv", 199), "a.csv has 199 different prompts instead of 200"),
        ("drawbench", lambda p: _file(p / "a.csv", b"text,kind\na,b\n"), "has the columns text, kind"),
        ("drawbench", lambda p: _file(p / "a.csv", b"Prompts,Category\na\n"), "row 2: 1 columns instead of 2"),
        ("drawbench", lambda p: _file(p / "a.txt", b"\xff\xfe"), "a.txt is not UTF-8"),
        ("drawbench", lambda p: _file(p / "a.csv", b""), "has 0 different prompts"),
        ("drawbench", lambda p: p, "cannot read .*: Is a directory"),
        ("partiprompts", lambda p: parti(p / "a.tsv", 1631), "a.tsv has 1631 rows instead of 1632"),
        ("partiprompts", lambda p: _file(p / "a.tsv", b"Prompt,Category\na,b\n"), "has the columns prompt,category"),
        ("pick-a-pic", lambda p: _file(p / "test.txt", b"a fox"), "test.txt is no directory"),
        ("pick-a-pic", lambda p: _file(p / "train.txt", b"a fox").parent, "no file has prompts of the test split"),
        (
            "pick-a-pic",
            lambda p: _file(pick_a_pic(p) / "train-0.parquet", b"").parent,
            "has both train.txt and train-0",
        ),
        ("pick-a-pic", lambda p: _file(p / "test_unique-0.parquet", b"x").parent, "is no Parquet file with a column"),
    ],
)
def test_copies_that_do_not_fit_are_explained(
    tmp_path: Path, name: str, make: Callable[[Path], Path], message: str
) -> None:
    """What is wrong, what is expected and where it is published."""
    with pytest.raises(
        UserError, match=rf"the suite {name}: .*{message}.*Give your own copy as --suite {name}=PATH.*http"
    ):
        load_suite(f"{name}={make(tmp_path)}")


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _changed(path: Path, content: bytes) -> Path:
    return _file(path, content).parent


@pytest.mark.parametrize("name", ["hpdv2", "drawbench", "partiprompts", "pick-a-pic"])
def test_without_a_copy_the_way_to_one_is_shown(tmp_path: Path, name: str) -> None:
    """No path, and a path that does not exist."""
    assert name in discover("suites")
    with pytest.raises(
        UserError, match=rf"its texts are not shipped\. Give your own copy as --suite {name}=PATH: .*http"
    ):
        load_suite(name)
    with pytest.raises(UserError, match=r"there is no .*missing\. Give your own copy"):
        load_suite(f"{name}={tmp_path / 'missing'}")


def test_a_path_is_refused_where_nothing_is_missing(tmp_path: Path) -> None:
    """A complete suite takes no copy; a file of one's own may have an equals sign in its name."""
    with pytest.raises(UserError, match="the suite animals is complete as it is; write --suite animals"):
        load_suite("animals=somewhere")
    own = _file(tmp_path / "guidance=7.txt", b"a fox\nan owl")
    assert load_suite(str(own)).name == "guidance=7"
    with pytest.raises(UserError, match=r"there is no suite 'drawbnch=a\.csv'; did you mean 'drawbench'"):
        load_suite("drawbnch=a.csv")


def test_training_on_a_benchmark_without_training_prompts_is_refused(tmp_path: Path) -> None:
    """Before anything is loaded; a method that trains nothing runs on it."""
    suite = f"drawbench={drawbench(tmp_path / 'DrawBench.csv')}"
    asked = {"model": "gaussian", "suite": suite, "rewards": ["jpeg-compressibility"], "seeds": [0], "preset": "smoke"}
    with pytest.raises(UserError, match="draft needs prompts to train on, and the suite drawbench has held-out ones"):
        Grid(resolve({**asked, "methods": ["best-of-n", "draft"]}))
    grid = Grid(resolve({**asked, "methods": ["best-of-n"]}))
    assert len(grid.evaluated["held-out"]) > 0
