"""Where a report is written: it replaces an older report and removes nothing else."""

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.report.folder import replacing


def write(target: Path, *names: str) -> None:
    """A report of those files, each with its own name in it."""
    with replacing(target) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)


def tree(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones, too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


FIRST = ("report.md", "report.html", "fig-01-a.png", "fig-12-b.svg", "table-a.csv", "run-1/report.md")


def test_an_older_report_gives_way_and_other_files_stay(tmp_path: Path) -> None:
    """Figures that the new report does not have are gone; notes, screenshots and folders of others are not."""
    write(tmp_path / "out", *FIRST)
    others = ("notes.md", "fig-mine.png", "page-top-dark.png", "run-7/data.csv", "cells/report.md")
    for name in others:
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    write(tmp_path / "out", "report.md", "table-b.csv")
    assert tree(tmp_path) == {f"out/{name}" for name in ("report.md", "table-b.csv", *others)}
    assert all((tmp_path / "out" / name).read_text() == "mine" for name in others)


@pytest.mark.parametrize("present", [("thesis.tex",), ("report.md",), ("fig-01-a.png", "table-a.csv")])
def test_a_folder_with_files_and_no_report_is_refused(tmp_path: Path, present: tuple[str, ...]) -> None:
    """Before anything is written, with the remedy; also where single names are like those of a report."""
    for name in present:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="new or empty directory with --out"):
        write(tmp_path, *FIRST)
    assert tree(tmp_path) == set(present)
    with pytest.raises(UserError, match="is a file"):
        write(tmp_path / present[0], *FIRST)


def test_an_error_leaves_the_older_report_as_it_was(tmp_path: Path) -> None:
    """Nothing of the new one is left, either."""
    write(tmp_path / "out", *FIRST)
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "out", "report.md", "table-new.csv", ".")
    assert tree(tmp_path) == {f"out/{name}" for name in FIRST}
    assert (tmp_path / "out" / "report.md").read_text() == "report.md"


def test_folders_without_a_name_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, its parent, an empty folder, a link to one, and folders that are not there yet."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    write(Path(), *FIRST)
    assert tree(inner) == set(FIRST)
    with pytest.raises(UserError, match="has files and no report"):
        write(Path(".."), *FIRST)
    (tmp_path / "link").symlink_to(inner, target_is_directory=True)
    write(tmp_path / "link", "report.md", "table-c.csv")
    assert (tmp_path / "link").is_symlink()
    assert tree(inner) == {"report.md", "table-c.csv"}
    write(tmp_path / "new" / "deep", *FIRST)
    assert tree(tmp_path / "new" / "deep") == set(FIRST)
