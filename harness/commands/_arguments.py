"""What several commands do with their arguments."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError

BASELINES = Path("results") / "baselines"


def words(text: str) -> list[str]:
    """A comma-separated list; commas inside brackets belong to a name."""
    from harness.config import split_outside_brackets

    return [word.strip() for word in split_outside_brackets(text, ",") if word.strip()]


def report_lines(report: Path) -> str:
    """Where a report is: its text, and the page with the same content."""
    return f"Report: {report}\nPage:   {report.with_name('report.html')}"


def require_run(directory: Path) -> None:
    """Raise UserError where a directory holds no run."""
    if not (directory / "run.json").is_file():
        raise UserError(f"{directory} holds no run (no run.json); runs are below results/")
