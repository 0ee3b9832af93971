"""The report's watch and axes of appearance: planted falls are named, what was not recorded is said, bytes repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.metrics.appearance import AXES
from harness.report.analysis import analyse
from harness.report.records import load_run
from harness.report.watch import appearance, every_warning, lead, marks, section, summary, watch_run
from tests.report.synthetic import Made, main_job, write_run


def planted(folder: Path, **changes: object) -> Path:
    """Two arms whose training reward rises; only with the first does the gold metric fall, far, from the base on."""
    gains = {
        ("draft", "emoji-3d"): 3.0,
        ("draft", "object-accuracy"): -1.5,
        ("ddpo", "emoji-3d"): 3.0,
    }
    return write_run(folder, main_job(gains=gains, images=False, seed_sd=0.0, **changes))


def add_metrics(folder: Path, shift: dict[str, float], *, base: bool = True) -> None:
    """Axes of appearance at the end: the base's by prompt, and every cell's moved by its seed and its arm's shift."""
    for path in sorted(folder.glob("cells/*/metrics.parquet")):
        scores = pd.read_parquet(path.with_name("scores.parquet"))
        first = scores[scores["split"] == "held-out"].drop_duplicates("prompt_id")
        arm, seed = str(first["arm"].iloc[0]), int(first["seed"].iloc[0])
        if arm == "base" and not base:
            continue
        table = pd.read_parquet(path)
        keys = first[["cell", "arm", "method", "training_reward", "seed", "variant", "prompt_id"]]
        level = np.arange(len(keys)) / 10
        for axis in AXES:
            value = level + (0 if arm == "base" else shift[arm] + 0.01 * seed)
            table = pd.concat([table, keys.assign(point="final", metric=axis, value=value, n=2)])
        table.to_parquet(path, index=False)


def test_a_planted_fall_is_named_and_its_numbers_are_those_of_the_records(tmp_path: Path) -> None:
    """The gold metric's fall is warned of in every seed of the one arm, with the mean change of the same pictures."""
    run = load_run(planted(tmp_path))
    watch = watch_run(run)
    assert len(watch.seen) == 10
    table = every_warning(watch).data
    gold = table[table["witness"] == "object-accuracy"]
    assert set(gold["arm"]) == {"draft"}
    assert sorted(gold["seed"]) == [0, 1, 2, 3, 4]
    line = gold[gold["seed"] == 2].iloc[0]
    scores = run.scores.astype({"point": str, "reward": str, "cell": str})
    scores = scores[(scores["reward"] == "object-accuracy") & (scores["split"] == "held-out")]
    cell = "draft--emoji-3d--seed2"

    def at(point: str) -> pd.Series:
        name = {"0": "base", "end": cell}.get(point, cell)
        rows = scores[(scores["cell"] == name) & (scores["point"] == {"0": "final", "end": "final"}.get(point, point))]
        return rows[rows["noise_id"] == 0].set_index("prompt_id")["score"]

    change = (at(str(line["since"])) - at(str(line["point"]))).to_numpy(dtype=np.float64)
    assert line["fall"] == pytest.approx(change.mean())
    assert line["standard_error"] == pytest.approx(stats.sem(change))
    assert line["base"] == pytest.approx(at("0").mean())
    assert line["prompts"] == 10
    (mark,) = marks(watch)
    assert "**draft** (5 of 5 seeds" in mark
    assert "ddpo" not in mark
    rows = summary(watch).data.set_index("arm")
    assert rows["flag"].to_dict() == {"draft": True, "ddpo": False}
    assert "object-accuracy (5)" in summary(watch).rows[0][-1]


def test_one_warned_seed_in_five_is_no_flag(tmp_path: Path) -> None:
    """A single false alarm is likely among five trainings (23 %); two are not."""
    watch = watch_run(load_run(planted(tmp_path)))
    warned = {cell.seed: seen for cell, seen in watch.seen if cell.arm == "draft"}
    quiet = [(cell, seen) for cell, seen in watch.seen if cell.arm == "ddpo" and not seen.warnings]
    for number, flag in ((1, False), (2, True)):
        mixed = [
            (cell, warned[k]) if k < number else (cell, quiet[0][1]) for k, (cell, _) in enumerate(watch.seen[-5:])
        ]
        changed = type(watch)(watch.run, tuple((cell, seen) for cell, seen in mixed))
        arm = mixed[0][0].arm
        assert changed.beyond_chance(arm, "emoji-3d") is flag
        assert bool(marks(changed)) is flag


def test_what_was_not_recorded_is_said(tmp_path: Path) -> None:
    """Records without metrics along training: diversity is named as unseen, and the axes as not recorded."""
    analysis = analyse(load_run(planted(tmp_path / "old", latents=3)))
    watch = watch_run(analysis.run)
    assert not any("diversity" in line and "Not recorded" in line for line in lead(watch))  # one latent along training
    plan = json.loads((tmp_path / "old" / "run.json").read_text())
    plan["config"]["evaluation"] = {"curve_latents": 2}
    (tmp_path / "old" / "run.json").write_text(json.dumps(plan))
    told = " ".join(lead(watch_run(load_run(tmp_path / "old"))))
    assert "Not recorded at all points, so that a fall may be unseen: diversity (10 of 10)" in told
    assert appearance(analysis) is None
    assert section(analysis)["appearance"] is None
    add_metrics(tmp_path / "old", {"draft": 1.0, "ddpo": 0.0}, base=False)
    assert appearance(analyse(load_run(tmp_path / "old"))) is None


def test_changes_of_appearance_are_seed_t_of_paired_differences(tmp_path: Path) -> None:
    """Each arm minus the base on the same prompts; the mean of the planted shifts with the interval over seeds."""
    folder = planted(tmp_path)
    add_metrics(folder, {"draft": 1.0, "ddpo": -0.5})
    table = appearance(analyse(load_run(folder)))
    assert table is not None
    data = table.data.set_index(["arm", "metric"])
    seeds = np.arange(5) * 0.01
    expected = stats.ttest_1samp(1.0 + seeds, 0).confidence_interval()
    line = data.loc[("draft", "saturation")]
    assert line["estimate"] == pytest.approx((1.0 + seeds).mean())
    assert (line["low"], line["high"]) == pytest.approx((expected.low, expected.high))
    assert data.loc[("ddpo", "dark_fraction"), "estimate"] == pytest.approx(-0.5 + seeds.mean())
    assert data.loc[("base", "edge_density"), "estimate"] == pytest.approx(0.45)
    assert "Exploratory" in table.note
    lacking = folder / "cells" / "draft--emoji-3d--seed0" / "metrics.parquet"
    kept = pd.read_parquet(lacking)
    kept[~kept["metric"].isin(AXES)].to_parquet(lacking, index=False)
    again = appearance(analyse(load_run(folder)))
    assert again is not None
    assert "Not recorded for 1 cell." in again.note
    assert again.data.set_index(["arm", "metric"]).loc[("draft", "saturation"), "seeds"] == 4


def test_partial_and_shuffled_runs(tmp_path: Path) -> None:
    """Row order does not matter; without a base nothing is watched, and that is said."""
    runs = [load_run(write_run(tmp_path / str(k), _job(), shuffle=k)) for k in (3, 4)]
    tables = [every_warning(watch_run(run)).data for run in runs]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert len(tables[0])
    bare = watch_run(load_run(write_run(tmp_path / "bare", main_job(images=False, missing=("base",)))))
    assert not bare.seen
    assert lead(bare)[0].startswith("Not watched")
    assert every_warning(bare).rows == ()
    assert marks(bare) == []


def _job() -> Made:
    gains = {("draft", "emoji-3d"): 3.0, ("draft", "object-accuracy"): -1.5}
    return main_job(gains=gains, images=False, seed_sd=0.0)
