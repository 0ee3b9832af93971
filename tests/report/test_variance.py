"""The figure of variance components, the table for unseen prompts and the sentence on detectable differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.report.analysis import Analysis, analyse
from harness.report.captions import Drawn
from harness.report.records import load_run
from harness.report.style import drawing
from harness.report.unseen import unseen_prompts
from harness.report.variance import smallest_detectable, variance_figure
from harness.stats.intervals import Interval, crossed, crossed_difference, seed_t
from tests.report.synthetic import Made, grid_job, main_job, write_run


def made(folder: Path, job: Made, **arms: Any) -> Analysis:
    """The analysis of a made-up run, arms changed in its run.json."""
    path = write_run(folder, job) / "run.json"
    content = json.loads(path.read_text())
    for arm in content["arms"]:
        arm.update(arms.get(arm["label"], {}))
    path.write_text(json.dumps(content))
    return analyse(load_run(folder))


def figure(analysis: Analysis) -> Drawn | None:
    """The figure, drawn as in a report."""
    with drawing():
        return variance_figure(analysis, "fig-10-variance")


def cells(analysis: Analysis, arm: str, reward: str) -> np.ndarray:
    """(S, P) gains in base SD, straight from the records."""
    scores = analysis.run.scores
    scores = scores[(scores["reward"] == reward) & (scores["split"] == "held-out") & (scores["point"] == "final")]
    key = ["prompt_id", "noise_id"]
    base = scores[scores["arm"] == "base"].set_index(key)["score"]
    mine = scores[(scores["arm"] == arm) & (scores["training_reward"] == reward)]
    gains = mine.set_index(["seed", *key])["score"] - base
    return gains.groupby(["seed", "prompt_id"]).mean().unstack().to_numpy() / analysis.gains.sd(reward)


def row(table: pd.DataFrame, arm: str, reward: str = "emoji-3d") -> pd.Series:
    """One method's line of the CSV."""
    found = table[(table["arm"] == arm) & (table["training_reward"] == reward)]
    assert len(found) == 1
    return found.iloc[0]


def assert_bounds(line: pd.Series, name: str, interval: Interval) -> None:
    """The three numbers of an interval."""
    shown = [line[name], line[f"{name} low"], line[f"{name} high"]]
    assert shown == pytest.approx([interval.estimate, interval.low, interval.high], nan_ok=True)


def test_the_table_has_both_intervals_from_the_records(tmp_path: Path) -> None:
    """Of gains and of differences to the reference."""
    analysis = made(tmp_path, main_job(images=False))
    table = unseen_prompts(analysis)
    draft, ddpo = (cells(analysis, arm, "emoji-3d") for arm in ("draft", "ddpo"))
    line = row(table.data, "ddpo")
    assert_bounds(line, "gain this suite", seed_t(ddpo.mean(axis=1)))
    assert_bounds(line, "gain unseen prompts", crossed(ddpo))
    assert_bounds(line, "difference unseen prompts", crossed_difference(ddpo, draft))
    assert line["difference this suite"] == pytest.approx(ddpo.mean() - draft.mean())
    assert np.isnan(row(table.data, "draft")["difference this suite"])
    assert len(table.rows) == 2
    assert "One instance" not in table.note


def test_what_was_made_elsewhere_varies_over_prompts_alone(tmp_path: Path) -> None:
    """One adapter: no interval for this suite, t over prompts for unseen ones, and the table says whose it is."""
    job = main_job(images=False, missing=tuple(f"ddpo--emoji-3d--seed{seed}" for seed in range(1, 5)))
    analysis = made(tmp_path, job, ddpo={"kind": "given", "seeded": False})
    table = unseen_prompts(analysis)
    draft, ddpo = (cells(analysis, arm, "emoji-3d") for arm in ("draft", "ddpo"))
    line = row(table.data, "ddpo")
    assert np.isnan(line["gain this suite low"])
    assert_bounds(line, "gain unseen prompts", seed_t(ddpo[0]))
    assert_bounds(line, "difference this suite", seed_t(ddpo.mean() - draft.mean(axis=1)))
    assert_bounds(line, "difference unseen prompts", crossed(ddpo - draft))
    assert "One instance each: ddpo" in table.note


def test_a_seed_alone_is_no_instance(tmp_path: Path) -> None:
    """A trained arm of which one seed ended has no interval for either target."""
    job = main_job(images=False, missing=tuple(f"ddpo--emoji-3d--seed{seed}" for seed in range(1, 5)))
    line = row(unseen_prompts(made(tmp_path, job)).data, "ddpo")
    for name in ("gain this suite", "gain unseen prompts", "difference this suite", "difference unseen prompts"):
        assert np.isfinite(line[name])
        assert np.isnan(line[f"{name} low"])


def test_the_figure_has_every_component_and_agrees_with_the_intervals(tmp_path: Path) -> None:
    """For this suite the parts add up to the squared standard error of the mean; caption and text name the numbers."""
    analysis = made(tmp_path, main_job(images=False, seed_sd=0.8))
    drawn = figure(analysis)
    assert drawn is not None
    bars = drawn.data[drawn.data["panel"] == "components"]
    for arm in ("draft", "ddpo"):
        mine = bars[bars["arm"] == arm].set_index("part")["share_of_squared_error"]
        assert list(mine.index) == ["seed", "seed_prompt", "residual", "prompt", "latent"]
        error = seed_t(cells(analysis, arm, "emoji-3d").mean(axis=1)).standard_error
        assert mine[["seed", "seed_prompt", "residual"]].sum() == pytest.approx(error**2, rel=0.02)
    curve = drawn.data[(drawn.data["panel"] == "detectable") & (drawn.data["target"] == "this suite")]
    now = curve[curve["seeds"] == 5]["detectable"].item()
    assert now == pytest.approx(analysis.primary[0].detectable)
    assert np.isnan(curve[curve["seeds"] == 3]["detectable"].item())  # three seeds of two arms cannot reject
    assert "5 training seeds, 10 prompts, 2 latents" in drawn.caption
    assert "ddpo against draft" in drawn.alt


def test_several_rewards_and_partial_runs_are_drawn(tmp_path: Path) -> None:
    """One panel for each reward, one latent, an arm with one seed left out."""
    lost = tuple(f"refl--{reward}--seed{seed}" for reward in ("emoji-3d", "emoji-clip") for seed in (1, 2))
    job = grid_job(images=False, arms=("draft", "ddpo", "refl"), missing=lost, diverged=(), no_scores=())
    drawn = figure(made(tmp_path, job))
    assert drawn is not None
    bars = drawn.data[drawn.data["panel"] == "components"]
    assert set(bars["arm"]) == {"draft", "ddpo"}
    assert bars["training_reward"].nunique() == 3
    assert "Each prompt has one latent" in drawn.caption


@pytest.mark.parametrize(
    "job", [main_job(images=False, seeds=1), main_job(images=False, missing=("base",)), main_job(images=False, seeds=0)]
)
def test_where_nothing_is_known_nothing_is_drawn(tmp_path: Path, job: Made) -> None:
    """No figure, a table of dashes, and a sentence that says so."""
    analysis = made(tmp_path, job)
    assert figure(analysis) is None
    table = unseen_prompts(analysis)
    assert table.data.filter(like="low").isna().all(axis=None)
    assert "cannot be told" in smallest_detectable(analysis)


def test_the_sentence_has_the_smallest_and_the_largest(tmp_path: Path) -> None:
    """Those of the primary comparisons, and those of gains."""
    analysis = made(tmp_path, main_job(images=False, arms=("draft", "ddpo", "refl")))
    text = smallest_detectable(analysis)
    found = sorted(judgement.detectable for judgement in analysis.primary)
    assert f"between a method and draft {found[0]:.2g}"[:-1] in text
    assert "as a gain over the base model" in text
    assert "adjusted by Holm" in text
