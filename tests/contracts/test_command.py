"""`python -m harness check`: the table, its exit codes, and mistakes that are said in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import cli
from harness.api import DiffusionModel
from harness.contracts import lab
from tests.contracts import test_broken_methods

BROKEN = Path(test_broken_methods.__file__)


@pytest.fixture
def check(gaussian: DiffusionModel, tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command with these words, on models that are already there; its exit code."""
    monkeypatch.setattr(lab, "models", lambda: (gaussian, tiny_model))

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["harness", "check", *words])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return command


def test_a_contract_that_holds(check: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, and a line for each contract that was asked for."""
    assert check("draft-k", "--only", "settings,diverges", "--set", "k=2") == 0
    shown = capsys.readouterr().out
    assert shown.count("\npassed ") == 2
    assert "k=2" in shown


def test_a_contract_that_is_broken(check: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, with what was seen and what to do."""
    assert check(f"{BROKEN}:ClampedPictures", "--only", "unclamped,settings") == 1
    shown = capsys.readouterr()
    assert "FAILED" in shown.out
    assert "why:    all" in shown.out
    assert "remedy: pass model.decode(latents)" in shown.out
    assert "1 passed, 1 failed" in shown.out
    assert shown.err.startswith("failed: unclamped; again with: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["drat"], "did you mean 'draft'?"),
        (["draft", "--only", "cost"], "did you mean 'costs'?"),
        (["draft", "--set", "batch=2"], "did you mean 'batch_size'?"),
        (["draft", "--set", "batch"], "write k=5"),
        (["nowhere.py:Method"], "does not exist"),
    ],
)
def test_mistakes(check: Callable[..., int], capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    """Exit code 2 and one line that says what would be right."""
    assert check(*words) == 2
    assert said in capsys.readouterr().err
