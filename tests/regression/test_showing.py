"""Costs as ratios, and comparisons as text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.regression.comparing import Comparison, compare
from harness.regression.costs import CostRow
from harness.regression.showing import markdown, terminal
from harness.regression.snapshot import take
from tests.regression.runs import edit_json, made


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A new run and an old one, of the same records."""
    old = made(tmp_path / "old", arms=("draft",), metrics=False)
    return Path(shutil.copytree(old, tmp_path / "new")), old


def compared(runs: tuple[Path, Path]) -> Comparison:
    """The two."""
    return compare(take(runs[0]), take(runs[1]))


def cost(runs: tuple[Path, Path], name: str) -> CostRow:
    """The row of a cost."""
    (found,) = (row for row in compared(runs).costs if row.cost == name)
    return found


def spend(run: Path, change: Callable[[dict[str, Any], int], object]) -> None:
    """Change what each cell of the arm has cost."""
    for seed in range(5):
        edit_json(run / "cells" / f"draft--emoji-3d--seed{seed}" / "status.json", lambda s, seed=seed: change(s, seed))


def seconds(run: Path) -> np.ndarray:
    """Logarithms of training seconds."""
    paths = sorted((run / "cells").glob("draft*/status.json"))
    return np.log([json.loads(path.read_text())["seconds"]["train"] for path in paths])


@pytest.mark.parametrize(("factor", "flagged"), [(1.0, False), (1.08, False), (1.3, True), (0.7, False)])
def test_seconds_are_dearer_by_a_tenth_and_beyond_noise(runs: tuple[Path, Path], factor: float, flagged: bool) -> None:
    """The interval of the ratio is Welch's of the logarithms; less is never flagged."""
    spend(runs[0], lambda s, seed: s["seconds"].update(train=s["seconds"]["train"] * factor))
    row = cost(runs, "train_seconds")
    interval = stats.ttest_ind(seconds(runs[0]), seconds(runs[1]), equal_var=False).confidence_interval()

    assert row.ratio == pytest.approx(factor)
    assert (row.low, row.high) == pytest.approx((np.exp(interval.low), np.exp(interval.high)))
    assert row.flagged == flagged
    assert ("Dearer:" in terminal(compared(runs))) == flagged


def test_noise_is_not_dearer(runs: tuple[Path, Path]) -> None:
    """A third more on average, from one slow cell."""
    spend(runs[0], lambda s, seed: s["seconds"].update(train=s["seconds"]["train"] * (4 if seed == 2 else 1)))

    assert cost(runs, "train_seconds").ratio > 1.1
    assert not cost(runs, "train_seconds").flagged


def test_seconds_on_other_hardware_are_not_judged(runs: tuple[Path, Path]) -> None:
    """Counts are."""
    edit_json(runs[0] / "provenance.json", lambda p: p.update(cpu="another"))
    spend(runs[0], lambda s, seed: s["seconds"].update(train=s["seconds"]["train"] * 3))
    spend(runs[0], lambda s, seed: s["cost"].update(queries=512.0))

    assert cost(runs, "train_seconds").note == "other hardware: not judged"
    assert not cost(runs, "train_seconds").flagged
    assert cost(runs, "queries").flagged
    assert cost(runs, "queries").ratio == 2.0


def test_the_timing_pass_needs_repetitions(runs: tuple[Path, Path]) -> None:
    """Measured once it is shown; measured three times it is judged."""
    for run, slow in zip(runs, (1.5, 1.0), strict=True):
        (run / "timing.json").write_text(json.dumps({"draft": {"seconds_per_picture": slow}}))
    assert cost(runs, "seconds_per_picture, alone").note == "measured once: not judged"
    for run, slow in zip(runs, (1.5, 1.0), strict=True):
        each = [{"seconds_per_picture": slow * (1 + 0.01 * i)} for i in range(3)]
        (run / "timing.json").write_text(json.dumps({"draft": {"repetitions": each}}))
    assert cost(runs, "seconds_per_picture, alone").flagged


def test_names_are_shown_as_they_are(runs: tuple[Path, Path]) -> None:
    """A label with the signs of tables and of HTML does not break the comment."""
    label = "a|b <b>*c*</b>"
    for run in runs:
        edit_json(run / "run.json", lambda plan: plan["arms"][0].update(label=label))
        edit_json(run / "run.json", lambda plan: [c.update(arm=label) for c in plan["cells"] if c["arm"] == "draft"])
    for run in runs:
        for path in run.glob("cells/draft*/scores.parquet"):
            pd.read_parquet(path).assign(arm=label).to_parquet(path, index=False)
    text = markdown(compared(runs))
    line = next(line for line in text.splitlines() if line.startswith("| a"))

    assert line.startswith(r"| a\|b &lt;b&gt;\*c\*&lt;/b&gt; | emoji-3d |")
    assert "<b>" not in text
    assert text.count("<details>") == text.count("</details>") > 0
    assert any(label in line for line in terminal(compared(runs)))


def test_a_margin_beyond_the_gain_is_said(runs: tuple[Path, Path]) -> None:
    """A method that gained less than the margin has nothing that the gate could miss."""
    new, old = take(runs[0]), take(runs[1])
    warning = "losing all of it would pass"

    assert warning in markdown(compare(new, old, 50.0))
    assert warning not in markdown(compare(new, old, 0.1))
