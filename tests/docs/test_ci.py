"""The job of docs/ci.md: what it calls exists, as it is called there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from harness.cli import app
from harness.config import presets
from harness.registry import discover

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")


def steps() -> list[dict[str, Any]]:
    """The steps of the one job."""
    match = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert match is not None
    (job,) = yaml.safe_load(match[1])["jobs"].values()
    found: list[dict[str, Any]] = job["steps"]
    return found


def commands() -> list[str]:
    """Every `python -m harness` of the page, once."""
    lines = PAGE.splitlines() + [line for step in steps() for line in step.get("run", "").splitlines()]
    found = [line.partition("  #")[0].strip() for line in lines if line.strip().startswith("python -m harness")]
    return list(dict.fromkeys(found))


def test_the_steps_are_shell() -> None:
    """Bash reads each of them."""
    scripts = [step["run"] for step in steps() if "run" in step]
    assert len(scripts) == 4
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str) -> None:
    """The command line takes every word of it, and what it names is there."""
    words = shlex.split(line)[3:]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    given = command.make_context("harness", words).params

    if "preset" in given:
        assert given["preset"] in presets()
        assert given["methods"] in discover("methods")
        assert given["rewards"] in discover("rewards")


def test_runs_and_baselines_are_those_that_were_made() -> None:
    """What is compared was written by an earlier line, to the directory of that name."""
    made = set(re.findall(r"--out (\S+)", PAGE))
    assert set(re.findall(r"harness compare (\S+)", PAGE)) <= made
    assert set(re.findall(r"baseline save (results/\S+)", PAGE)) <= made
    assert set(re.findall(r"harness compare \S+ (\w+)", PAGE)) == set(
        re.findall(r"baseline save results/\S+ (\w+)", PAGE)
    )
