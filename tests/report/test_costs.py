"""The table of costs: operations are counts times units, and say so where they were not measured."""

import json
import shutil
from pathlib import Path

import pytest

from harness.report import account
from harness.report.analysis import analyse
from harness.report.records import load_run
from harness.report.tables import Table
from tests.report.synthetic import BUDGET, Made, cell_cost, write_run

REWARD = "1*emoji-3d+1*jpeg-compressibility"
UNITS = {
    "denoiser_row": {"forward": 2e9, "backward": 3e9, "backward_to_input": 5e9},
    "decode": {"forward": 7e9, "backward": 11e9},
    "rewards": {
        "emoji-3d": {"forward": 13e9, "backward": 17e9},
        "jpeg-compressibility": {"forward": 0.0, "backward": 0.0},
    },
}
SHARES = {
    "draft": {"rows_to_input_share": 0.9, "peak_memory_mib": 5.0},
    "ddpo": {"rows_to_input_share": 0.0, "peak_memory_mib": 5.0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on the sum of two rewards; nothing about operations yet."""
    made = Made(training_rewards=(REWARD,), seeds=2, latents=1, images=False, metrics=False)
    return write_run(tmp_path_factory.mktemp("costs"), made)


def table(run: Path, folder: Path, units: object, timing: object) -> Table:
    """The table of a copy of the run with these files."""
    copied = shutil.copytree(run, folder / "run")
    (copied / "flops.json").write_text(json.dumps(units))
    (copied / "timing.json").write_text(json.dumps(timing))
    return account.costs(analyse(load_run(copied)))


def column(found: Table) -> list[str]:
    """What is shown as operations."""
    place = found.headers.index("TFLOPs")
    return [row[place] for row in found.rows]


def test_operations_are_counts_times_units(run: Path, tmp_path: Path) -> None:
    """By hand for a method with the reward's gradient and for one without; the reward of no operations is named."""
    found = table(run, tmp_path, UNITS, SHARES)
    expected = {}
    for arm, share in (("draft", 0.9), ("ddpo", 0.0)):
        cost = cell_cost(arm, BUDGET)
        rows = 2e9 * (cost["forward_rows"] + cost["gradient_rows"] + cost["recomputed_rows"])
        rows += cost["backward_rows"] * (3e9 + share * 2e9)
        pictures, gradients = BUDGET / 2, cost["reward_gradients"] / 2  # of two components, both differentiable here
        expected[arm] = (rows + 7e9 * BUDGET + 11e9 * gradients + 13e9 * pictures + 17e9 * gradients) / 1e12
    assert expected["draft"] != expected["ddpo"]
    for row in found.data.itertuples():
        assert row.tflops == pytest.approx(expected[row.arm], rel=1e-12)
    assert column(found) == [f"{expected[arm]:.3g}" for arm in ("draft", "ddpo")]
    assert "no such operation: jpeg-compressibility." in found.note


def test_records_without_measured_operations_say_so(run: Path, tmp_path: Path) -> None:
    """No file, a reward that was not measured, or a share that was not: never a zero."""
    assert column(account.costs(analyse(load_run(run)))) == ["not measured"] * 2
    partly = {**UNITS, "rewards": {"emoji-3d": UNITS["rewards"]["emoji-3d"]}}
    assert column(table(run, tmp_path / "reward", partly, SHARES)) == ["not measured"] * 2
    found = table(run, tmp_path / "share", UNITS, {"ddpo": SHARES["ddpo"], "draft": {"peak_memory_mib": 5.0}})
    assert column(found)[0] == "not measured"
    assert column(found)[1] != "not measured"
    assert found.data.set_index("arm")["tflops"].isna().groupby("arm").all().to_dict() == {"draft": True, "ddpo": False}
