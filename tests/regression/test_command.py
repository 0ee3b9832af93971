"""`baseline save` and `compare` on the command line: files, exit codes, and what the report shows of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main
from harness.regression.comparing import compare, record
from harness.regression.snapshot import read, take
from harness.report.build import build_report
from harness.report.records import load_run
from harness.report.regression import regression
from tests.regression.runs import base_sd, edit_json, made, shifted


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, in the folder from which commands are given."""
    monkeypatch.chdir(tmp_path)
    return made(tmp_path / "results" / "old", arms=("draft",), seeds=4)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Give a command; its exit code, and what it printed."""

    def called(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["harness", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return called


def shown(run: Path) -> str:
    """The report's table, with its note."""
    table = regression(load_run(run))
    assert table is not None
    return f"{table.markdown} {table.note}"


def test_save_and_compare(old: Path, call) -> None:  # type: ignore[no-untyped-def]
    """Pinned, the run is found by name; a loss exits with 1, is in the comment, and in the next report."""
    code, text = call("baseline", "save", old, "mine")
    assert code == 0, text
    pinned = old.parent / "baselines" / "mine.json"
    assert pinned.stat().st_size < 60_000

    new = Path(shutil.copytree(old, old.with_name("new")))
    code, text = call("compare", new, "mine")
    assert (code, text.splitlines()[0]) == (0, "made-up-0a1b2c3d against mine: identical, all records are the same.")
    assert "**identical** at a margin of 0.1 base SD" in shown(new)

    shifted(new, -0.5 * base_sd(old), "draft--*", spread=0.02)
    comment = old.parent / "comment.md"
    code, text = call("compare", new, pinned, "--markdown", comment)
    assert code == 1
    assert "failed: made-up-0a1b2c3d against mine: WORSE" in text
    assert "against mine: **WORSE**, a loss larger than the margin" in comment.read_text(encoding="utf-8")
    assert "raise `version`" in text
    stored = json.loads((new / "comparison.json").read_text(encoding="utf-8"))
    assert stored["outcome"] == "WORSE"
    assert stored["rows"][0]["difference"]["estimate"] == pytest.approx(-0.5, abs=0.1)
    report = build_report(new).read_text(encoding="utf-8")
    assert "## Regression against a baseline" in report
    assert "**WORSE** at a margin of 0.1 base SD" in report

    edit_json(new / "cells" / "base" / "status.json", lambda s: s.update(finished="2027-01-01T00:00:00Z"))
    assert "compare it again" in shown(new)
    assert call("compare", new, old)[0] == 1  # another run directory serves as well


def test_a_file_says_what_the_run_says(old: Path, tmp_path: Path, call) -> None:  # type: ignore[no-untyped-def]
    """A comparison with the pinned file is that with the run; the file of the same records is the same bytes."""
    call("baseline", "save", old, "mine")
    pinned = tmp_path / "results" / "baselines" / "mine.json"
    new = shifted(Path(shutil.copytree(old, tmp_path / "new")), -0.03, "draft--*", spread=0.1)
    by_file, by_run = (record(compare(take(new), side)) for side in (read(pinned), take(old, "mine")))
    before = pinned.read_bytes()

    assert by_file == by_run
    assert call("baseline", "save", old, "mine") == (0, "results/baselines/mine.json is this run already\n")
    assert call("baseline", "save", new, "mine")[0] == 2
    assert pinned.read_bytes() == before
    assert call("baseline", "save", new, "mine", "--force")[0] == 0
    assert pinned.read_bytes() != before


def test_a_partial_run_is_no_baseline(old: Path, call) -> None:  # type: ignore[no-untyped-def]
    """The missing cells are named."""
    (old / "cells" / "draft--emoji-3d--seed2" / "status.json").unlink()
    code, text = call("baseline", "save", old, "mine")

    assert code == 2
    assert "1 cells are missing (draft--emoji-3d--seed2)" in text


def test_strict_minds_what_is_open(old: Path, call) -> None:  # type: ignore[no-untyped-def]
    """Inconclusive is no failure, unless told."""
    new = shifted(Path(shutil.copytree(old, old.with_name("new"))), -0.05, "draft--*", spread=0.3)
    code, text = call("compare", new, old)
    assert code == 0
    assert "inconclusive" in text
    assert "seeds in both" in text
    code, text = call("compare", new, old, "--strict")
    assert code == 2
    assert "undecided: --strict" in text


def _edit(content: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    *parents, last = path
    target: Any = content
    for key in parents:
        target = target[key]
    if value is None:
        del target[last]
    else:
        target[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(((key,), None) for key in ("name", "git", "platform", "identity", "rewards", "arms", "cells", "pairs")),
        *(((key,), 5) for key in ("git", "platform", "rewards", "arms", "training_rewards", "base_sd", "timing")),
        (("baseline schema",), True),
        (("git",), {}),
        (("arms", 0, "label"), None),
        (("base_sd", "emoji-3d"), -1.0),
        (("base_sd", "emoji-3d"), 0.0),
        (("cells", 1, "seed"), "x"),
        (("cells", 1, "seed"), 2),
        (("cells", 1, "arm"), "other"),
        (("cells", 1, "scored", "emoji-3d"), None),
        (("cells", 1, "scored", "emoji-3d", "scores"), [1.0]),
        (("cells", 1, "scored", "emoji-3d", "value"), "much"),
    ],
)
def test_an_edited_baseline_is_one_line(old: Path, call, path: tuple[str | int, ...], value: object) -> None:  # type: ignore[no-untyped-def]
    """Whatever was taken out of the file or put into it by hand."""
    call("baseline", "save", old, "mine")
    pinned = old.parent / "baselines" / "mine.json"
    edit_json(pinned, lambda content: _edit(content, path, value))
    code, text = call("compare", old, "mine")
    assert code == 2, text
    assert "save it again" in text
    assert text.count("\n") == 1


def test_what_cannot_be_written_is_no_loss(old: Path, call) -> None:  # type: ignore[no-untyped-def]
    """Exit code 1 is for what is WORSE alone."""
    code, text = call("compare", old, old, "--markdown", old)
    assert code == 2
    assert "could not be written: Is a directory" in text


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (("compare", "results/old", "mni"), "there is no baseline 'mni'"),
        (("compare", "results/none", "mine"), "holds no run"),
        (("compare", "results/old", "results/old/run.json"), "holds no baseline"),
        (("compare", "results/old", "results/old/cells/base/scores.parquet"), "holds no baseline"),
        (("baseline", "save", "results/old", "a/b"), "is no name for a file"),
    ],
)
def test_mistakes_are_one_line(old: Path, call, words: tuple[str, ...], shown: str) -> None:  # type: ignore[no-untyped-def]
    """Exit code 2 and no traceback."""
    code, text = call(*words)
    assert code == 2
    assert shown in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("name", ["run.json", "provenance.json", "cells/base/status.json"])
def test_a_damaged_record_is_one_line(old: Path, call, name: str) -> None:  # type: ignore[no-untyped-def]
    """Cut off in the middle, as a full disk or an editor may leave it."""
    path = old / name
    path.write_bytes(path.read_bytes()[:20])
    code, text = call("compare", old, old)
    assert code == 2
    assert f"{old / name} is damaged" in text
    assert text.count("\n") == 1
