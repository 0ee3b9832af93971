"""Figures that a second process writes."""

from __future__ import annotations

from pathlib import Path

from harness.report.analysis import analyse
from harness.report.figures import draw
from harness.report.records import load_run
from harness.report.style import drawing
from harness.report.writing import figure_writer
from tests.report.synthetic import main_job, write_run


def test_a_second_process_writes_the_same_bytes(tmp_path: Path) -> None:
    """Every figure and every CSV, in the settings of reports."""
    analysis = analyse(load_run(write_run(tmp_path / "run", main_job(seeds=2, images=False))))
    written = {}
    for name, beside in (("here", False), ("beside", True)):
        folder = tmp_path / name
        folder.mkdir()
        with figure_writer(folder, beside=beside) as write, drawing():
            draw(analysis, write)
        written[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.rsplit(".")[-1] for path in written["here"]} == {"png", "svg", "csv"}
    assert written["here"] == written["beside"]
