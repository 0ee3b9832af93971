"""What `compare` says of made-up runs, against scipy on numbers that pandas takes straight from the files."""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.errors import UserError
from harness.regression.comparing import Comparison, compare
from harness.regression.gating import Family, Row
from harness.regression.snapshot import take
from harness.stats.gate import GateOutcome
from tests.regression.runs import base_sd, edit_json, edit_scores, made, reseeded, seed_gains, shifted
from tests.report.synthetic import grid_job, main_job, write_run


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are compared with. Read it, do not change it."""
    return made(tmp_path_factory.mktemp("old"))


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return Path(shutil.copytree(old, tmp_path / "new"))


once = functools.cache(take)  # of the run that no test changes


def compared(new: Path, old: Path, margin: float = 0.1, *also: str) -> Comparison:
    """Both runs, compared."""
    return compare(take(new), once(old), margin, also)


def row(comparison: Comparison, arm: str, reward: str = "emoji-3d") -> Row:
    """The row of an arm and reward."""
    (found,) = (r for r in comparison.rows if (r.arm, r.reward) == (arm, reward) and r.family is not Family.POOLED)
    return found


def test_equal_records_are_identical_in_any_order(old: Path, tmp_path: Path) -> None:
    """No test is made, also where the rows of all files stand in another order."""
    shuffled = write_run(tmp_path / "new", main_job(images=False), shuffle=3)
    found = compared(shuffled, old)

    assert found.outcome is GateOutcome.IDENTICAL
    assert {r.outcome for r in found.rows} == {GateOutcome.IDENTICAL}
    assert {r.golden for r in found.rows} == {"equal"}
    assert not found.undecided
    assert not found.changes


def test_one_changed_score_is_seen(new: Path, old: Path) -> None:
    """One picture of one cell by one unit in the last place of a double: not identical, but equal up to rounding."""

    def nudge(scores: pd.DataFrame) -> pd.DataFrame:
        where = scores.index[(scores["reward"] == "emoji-3d") & (scores["point"] == "final")][0]
        scores.loc[where, "score"] = np.nextafter(scores.loc[where, "score"], np.inf)
        return scores

    found = compared(edit_scores(new, nudge, "draft--*seed2"), old)

    assert row(found, "draft").outcome is GateOutcome.EQUIVALENT
    assert row(found, "draft").how == "equal up to rounding"
    assert row(found, "draft").golden == "equal"
    assert row(found, "ddpo").outcome is GateOutcome.IDENTICAL
    assert found.outcome is GateOutcome.EQUIVALENT


def test_the_first_tier_has_a_tolerance(new: Path, old: Path) -> None:
    """Scores off by 1e-5 are no rounding any more: a statistical question, here equivalence."""
    found = compared(edit_scores(new, lambda s: s.assign(score=s["score"] * (1 + 1e-5)), "draft--*"), old)

    assert row(found, "draft").golden == "differs by up to 1e-05"
    assert row(found, "draft").how == "paired, 5 seeds"
    assert row(found, "draft").outcome is GateOutcome.EQUIVALENT


def test_paired_by_seed_as_scipy_does(new: Path, old: Path) -> None:
    """Estimate, interval and p are those of a paired t test on gains by seed over the base's spread."""
    found = row(compared(shifted(new, -0.5, "draft--*", spread=0.05), old), "draft")
    sd = base_sd(old)
    test = stats.ttest_rel(seed_gains(new, "draft") / sd, seed_gains(old, "draft") / sd)
    interval = test.confidence_interval(0.9)
    beyond = stats.ttest_1samp(
        (seed_gains(new, "draft") - seed_gains(old, "draft")) / sd, -0.1, alternative="less"
    ).pvalue

    assert found.difference.estimate == pytest.approx(
        float((seed_gains(new, "draft") - seed_gains(old, "draft")).mean() / sd)
    )
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert found.p_worse == pytest.approx(beyond)
    assert found.outcome is GateOutcome.WORSE
    assert found.how == "paired, 5 seeds"


def test_other_seeds_are_independent_samples(new: Path, old: Path) -> None:
    """Welch's test, and the table says so."""
    found = row(compared(reseeded(shifted(new, -0.5, "draft--*", spread=0.05), 100), old), "draft")
    sd = base_sd(old)
    test = stats.ttest_ind(seed_gains(new, "draft") / sd, seed_gains(old, "draft") / sd, equal_var=False)
    interval = test.confidence_interval(0.9)

    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert found.how == "Welch, 5 seeds"
    assert found.golden == "skipped: other seeds"


def test_seeds_are_matched_not_counted(new: Path, old: Path) -> None:
    """Seeds 2 to 6 against 0 to 4: the pairs are 2, 3 and 4, and the row says what was left out."""
    found = row(compared(reseeded(shifted(new, -0.5, "draft--*", spread=0.05), 2), old), "draft")
    difference = (seed_gains(new, "draft") - seed_gains(old, "draft")).dropna() / base_sd(old)

    assert len(difference) == 3
    assert found.difference.estimate == pytest.approx(float(difference.mean()))
    assert found.how == "paired, 3 seeds"
    assert "0, 1, 5, 6" in found.note


def test_only_pictures_that_both_have_count(new: Path, old: Path) -> None:
    """A cell lacks two pictures: every cell of both runs, and the base model, is taken on the others."""
    lost = {("he-01", 0), ("he-04", 1)}

    def drop(scores: pd.DataFrame) -> pd.DataFrame:
        pairs = zip(scores["prompt_id"], scores["noise_id"], strict=True)
        return scores[[pair not in lost for pair in pairs]]

    found = row(compared(edit_scores(shifted(new, -0.5, "draft--*", spread=0.05), drop, "draft--*seed1"), old), "draft")
    keep = {(f"he-{p:02d}", n) for p in range(10) for n in range(2)} - lost
    difference = (seed_gains(new, "draft", keep=keep) - seed_gains(old, "draft", keep=keep)) / base_sd(old)

    assert found.difference.estimate == pytest.approx(float(difference.mean()))
    assert found.note == "on the 90% of pictures that both have"


@pytest.mark.parametrize(
    ("by", "spread", "outcome"),
    [
        (-0.4, 0.05, GateOutcome.WORSE),
        (-0.1, 0.05, GateOutcome.INCONCLUSIVE),
        (-0.07, 0.01, GateOutcome.NOT_WORSE),
        (0.0, 0.02, GateOutcome.EQUIVALENT),
        (0.4, 0.05, GateOutcome.IMPROVED),
    ],
)
def test_outcomes(new: Path, old: Path, by: float, spread: float, outcome: GateOutcome) -> None:
    """Losses and gains around a margin of 0.1 base SD; a difference that is not too small is never equivalent."""
    sd = base_sd(old)
    noise = np.array([np.random.default_rng([seed + 1, 7]).normal(0, spread * sd) for seed in range(5)]).mean()
    found = row(compared(shifted(new, by * sd - noise, "draft--*", spread=spread * sd), old), "draft")

    assert found.difference.estimate == pytest.approx(by, abs=1e-9)
    assert found.outcome in (outcome, GateOutcome.EQUIVALENT if outcome is GateOutcome.NOT_WORSE else outcome)
    assert (found.needed is not None) == (outcome is GateOutcome.INCONCLUSIVE)


def test_the_margin_decides(new: Path, old: Path) -> None:
    """The same loss of 0.4 base SD is WORSE at a margin of 0.1 and not worse at 1."""
    shifted(new, -0.4 * base_sd(old), "draft--*", spread=0.05)

    assert compared(new, old, 0.1).outcome is GateOutcome.WORSE
    assert compared(new, old, 1.0).outcome in (GateOutcome.NOT_WORSE, GateOutcome.EQUIVALENT)
    with pytest.raises(UserError, match="--margin"):
        compared(new, old, 0.0)


def test_other_rewards_decide_only_when_named(new: Path, old: Path) -> None:
    """A loss of the gold metric is shown as WORSE and fails nothing, unless the user says that it decides."""
    shifted(new, -0.3, "draft--*", spread=0.02, reward="object-accuracy")
    seen = compared(new, old)
    told = compared(new, old, 0.1, "object-accuracy")

    assert row(seen, "draft", "object-accuracy").outcome is GateOutcome.WORSE
    assert row(seen, "draft", "object-accuracy").family is Family.WATCHED
    assert seen.outcome is not GateOutcome.WORSE
    assert told.outcome is GateOutcome.WORSE
    assert compared(new, old, 0.1, "all").outcome is GateOutcome.WORSE
    with pytest.raises(UserError, match=r"object-acuracy.*did you mean 'object-accuracy'"):
        compared(new, old, 0.1, "object-acuracy")


def test_a_worse_base_model_is_no_worse_method(new: Path, old: Path) -> None:
    """All pictures lose the same: gains are unchanged, and the base model, which has no seed variance, is WORSE."""
    found = compared(shifted(new, -0.3, "*"), old)

    assert row(found, "base").outcome is GateOutcome.WORSE
    assert row(found, "base").how == "one value each, no seed variance"
    assert row(found, "base").difference.estimate == pytest.approx(-0.3 / base_sd(old))
    assert row(found, "draft").difference.estimate == pytest.approx(0, abs=1e-8)
    assert row(found, "draft").outcome is GateOutcome.EQUIVALENT


def test_diverged_cells_count_as_no_gain(new: Path, old: Path) -> None:
    """A cell that diverged without scores is compared with a gain of 0, and the change of its state is said."""
    shutil.rmtree(new / "cells" / "draft--emoji-3d--seed3")
    folder = new / "cells" / "draft--emoji-3d--seed3"
    folder.mkdir()
    (folder / "status.json").write_text('{"state": "diverged", "reason": "the loss is NaN"}')
    found = compared(new, old)
    gains = seed_gains(old, "draft") / base_sd(old)

    assert row(found, "draft").difference.estimate == pytest.approx(-float(gains[3]) / 5)
    assert row(found, "draft").how == "paired, 5 seeds"
    assert "draft on emoji-3d, seed 3: completed → diverged" in found.changes


def test_what_is_missing_is_said(new: Path, old: Path) -> None:
    """An arm that is gone, and a cell that crashed: the rest is compared, and the comparison is undecided."""
    edit_json(new / "run.json", lambda plan: plan["arms"].pop(1))
    edit_json(new / "run.json", lambda plan: plan.update(cells=[c for c in plan["cells"] if c["arm"] != "ddpo"]))
    (new / "cells" / "draft--emoji-3d--seed0" / "status.json").write_text('{"state": "crashed"}')
    found = compared(new, old)

    assert found.outcome is GateOutcome.EQUIVALENT or found.outcome is GateOutcome.IDENTICAL
    assert found.undecided
    assert "arm ddpo: not in the new run" in found.missing
    assert "cell draft--emoji-3d--seed0: not finished in the new run" in found.missing
    assert "without seeds that only one side has: 0" in row(found, "draft").note


def test_incomparable_runs_are_refused_with_the_difference(new: Path, old: Path) -> None:
    """Other weights, sampler, budget: each is named, and nothing is compared."""
    for change, shown in (
        (lambda p: p["model"].update(fingerprint="other"), "model c0ffee → other"),
        (lambda p: p["sampler"].update(steps=50), "sampler.steps 10 → 50"),
        (lambda p: p["budget"].update(amount=512), "budget.amount 256 → 512"),
        (lambda p: p["suite"].update(sha256="cd" * 32), "suite.sha256 abababababab… → cdcdcdcdcdcd…"),
    ):
        edit_json(new / "run.json", change)
        with pytest.raises(UserError, match=shown.replace(".", r"\.")):
            compared(new, old)
        shutil.copy(old / "run.json", new / "run.json")


def test_nothing_in_common_is_refused(new: Path, old: Path) -> None:
    """No arm of one is in the other."""
    edit_json(new / "run.json", lambda plan: [arm.update(label=f"my {arm['label']}") for arm in plan["arms"]])
    with pytest.raises(UserError, match="my draft, my ddpo against draft, ddpo"):
        compared(new, old)


def test_changed_versions_and_settings_are_shown(new: Path, old: Path) -> None:
    """They are no obstacle: a new version of a method is what one compares."""
    edit_json(new / "run.json", lambda plan: plan["arms"][0].update(version="2"))
    edit_json(new / "run.json", lambda plan: plan["arms"][0]["config"].update(learning_rate=0.01))

    assert set(compared(new, old).changes) == {"draft: version 1 → 2", "draft: config.learning_rate 0.001 → 0.01"}


@pytest.mark.parametrize(
    ("place", "change"), [(0, {"version": "3"}), (0, {"weights_sha256": {"a.safetensors": "cd" * 32}})]
)
def test_scores_of_another_reward_are_not_compared(new: Path, old: Path, place: int, change: dict[str, object]) -> None:
    """Another version or other weights: larger numbers are no improvement. Only the training reward is needed."""
    shifted(new, 1.0, "draft--*")
    edit_json(new / "run.json", lambda plan: plan["rewards"][place].update(change))
    with pytest.raises(UserError, match=r"reward emoji-3d: version 1 in the baseline, (3|1, weights [0-9a-f]{12}) in"):
        compared(new, old)
    shutil.copy(old / "run.json", new / "run.json")
    edit_json(new / "run.json", lambda plan: plan["rewards"][3].update(change))
    found = compared(new, old)
    assert "emoji-clip-heldout" not in {r.reward for r in found.rows}
    assert any("reward emoji-clip-heldout: version 1" in line for line in found.missing)
    with pytest.raises(UserError, match="--rewards: 'emoji-clip-heldout' did not score both runs in one version"):
        compared(new, old, 0.1, "emoji-clip-heldout")


def unscored(scores: pd.DataFrame, latents: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    """The training reward gave no number."""
    gone = (scores["reward"] == "emoji-3d") & scores["noise_id"].isin(latents)
    return scores.assign(score=scores["score"].where(~gone))


@pytest.mark.parametrize("cells", ["draft--*", "draft--*seed3"])
@pytest.mark.parametrize("latents", [(0, 1), (1,)])
def test_what_has_no_score_is_not_called_good(new: Path, old: Path, cells: str, latents: tuple[int, ...]) -> None:
    """A completed cell, or some pictures of it, scored NaN: that the others are equal is no proof."""
    found = compared(edit_scores(new, lambda s: unscored(s, latents), cells), old)

    assert row(found, "draft").outcome is GateOutcome.INCONCLUSIVE
    assert row(found, "ddpo").outcome is GateOutcome.IDENTICAL
    assert found.outcome is GateOutcome.INCONCLUSIVE
    assert found.undecided
    if latents == (1,):
        assert "on the 50% of pictures that both have" in row(found, "draft").note
    else:
        seeds = "3" if "seed3" in cells else "0, 1, 2, 3, 4"
        assert f"no score in the new run: seeds {seeds}" in row(found, "draft").note
        assert f"draft on emoji-3d: seeds {seeds} have no score in the new run" in found.missing


def test_a_loss_is_worse_also_where_something_has_no_score(new: Path, old: Path) -> None:
    """The seeds that have scores are enough."""
    edit_scores(shifted(new, -0.5, "draft--*", spread=0.05), unscored, "draft--*seed3")

    assert row(compared(new, old), "draft").outcome is GateOutcome.WORSE


def test_a_gain_over_another_base_model_is_another_gain(new: Path, old: Path) -> None:
    """The cells' records are the same, and the base model has risen by half a base SD: gains have fallen by as much."""
    found = compared(shifted(new, 0.5 * base_sd(old), "base"), old)

    assert row(found, "draft").difference.estimate == pytest.approx(-0.5)
    assert row(found, "draft").outcome is GateOutcome.WORSE
    assert row(found, "draft").how == "paired, 5 seeds with one difference"
    assert row(found, "base").outcome is GateOutcome.IMPROVED


def test_few_seeds_with_one_difference_are_no_evidence(tmp_path: Path) -> None:
    """Four equal losses may be chance where a reward has few values: one in sixteen even without a loss."""
    old = made(tmp_path / "old", seeds=4)
    new = shifted(Path(shutil.copytree(old, tmp_path / "new")), 0.5 * base_sd(old), "base")

    assert row(compare(take(new), take(old)), "draft").outcome is GateOutcome.INCONCLUSIVE


def test_equal_ends_of_other_records_are_not_identical(tmp_path: Path) -> None:
    """Equal pictures at the end, other points along training: equivalent, since identical means all records."""
    old = made(tmp_path / "old", seeds=2)
    new = Path(shutil.copytree(old, tmp_path / "new"))
    edit_scores(new, lambda s: s[s["point"] == "final"], "draft--*")

    assert row(compare(take(new), take(old)), "draft").outcome is GateOutcome.EQUIVALENT


def test_other_prompts_or_latents_are_refused(new: Path, old: Path) -> None:
    """Gains that are stored beside pictures are means over these."""
    edit_scores(new, lambda s: s.assign(noise_id=s["noise_id"] + 10))
    with pytest.raises(UserError, match="no evaluated prompt and latent in common"):
        compared(new, old)


def test_seeds_that_were_not_planned_again_are_said(new: Path, old: Path) -> None:
    """Three of five seeds are compared in pairs, and the comparison is not complete."""
    edit_json(new / "run.json", lambda p: p.update(cells=[c for c in p["cells"] if c["seed"] in (-1, 0, 2, 3)]))
    found = compared(new, old)

    assert "draft on emoji-3d: seeds 1, 4 of the baseline" in found.missing
    assert found.undecided


def test_without_a_reward_that_decides_nothing_is_said(new: Path, old: Path) -> None:
    """The training reward scored nothing in the new run, other rewards did; or gave the base model no number."""
    edit_scores(new, unscored, "base")
    assert compared(new, old).outcome is GateOutcome.INCONCLUSIVE
    edit_scores(new, lambda s: s[s["reward"] != "emoji-3d"])
    with pytest.raises(UserError, match="reward emoji-3d: does not score the new run"):
        compared(new, old)


def test_on_another_platform_bits_are_not_expected(new: Path, old: Path) -> None:
    """The first tier is skipped with the reason."""
    edit_json(new / "provenance.json", lambda p: p.update(packages={"torch": "3.0"}))

    assert row(compared(shifted(new, 0.01, "draft--*"), old), "draft").golden == "skipped: other torch"


def test_many_cells_are_adjusted_together(tmp_path: Path) -> None:
    """Holm as statsmodels has it, over the cells that were tested; the pooled loss is a stratified paired t test."""
    from statsmodels.stats.multitest import multipletests

    old = write_run(
        tmp_path / "old",
        grid_job(
            images=False,
            metrics=False,
            arms=("draft", "draft-k", "refl"),
            latents=2,
            seeds=4,
            diverged=(),
            no_scores=(),
        ),
    )
    new = Path(shutil.copytree(old, tmp_path / "new"))
    for i, reward in enumerate(("emoji-3d", "emoji-clip", "jpeg-compressibility")):
        sd = base_sd(old, reward)
        for arm, loss in (("draft", 0.15), ("refl", 0.35)):
            shifted(new, -(loss + 0.1 * i) * sd, f"{arm}--{reward}--*", spread=0.08 * sd, reward=reward)
    found = compared(new, old)
    cells = [r for r in found.rows if r.family is Family.CELL]
    tested = [r for r in cells if np.isfinite(r.p_worse)]
    adjusted = multipletests([r.p_worse for r in tested], method="holm")[1]

    assert len(cells) == 3 * 3 + 3
    assert len(tested) == 6
    assert [r.adjusted_p for r in tested] == pytest.approx(adjusted.tolist())
    assert all((r.outcome is GateOutcome.WORSE) == (r.adjusted_p < 0.05) for r in tested)
    assert any(r.p_worse < 0.05 <= r.adjusted_p for r in tested)
    assert {r.outcome for r in cells if not np.isfinite(r.p_worse)} == {GateOutcome.IDENTICAL}
    pooled = {r.arm: r for r in found.rows if r.family is Family.POOLED}
    gaps = [
        (seed_gains_of(new, "draft", reward) - seed_gains_of(old, "draft", reward)) / base_sd(old, reward)
        for reward in ("emoji-3d", "emoji-clip", "jpeg-compressibility")
    ]

    assert pooled["draft"].difference.estimate == pytest.approx(float(np.mean([gap.mean() for gap in gaps])))
    error = np.sqrt(sum(gap.var(ddof=1) / len(gap) for gap in gaps)) / 3
    assert pooled["draft"].difference.standard_error == pytest.approx(float(error))
    assert pooled["draft-k"].outcome is GateOutcome.IDENTICAL


def seed_gains_of(run: Path, arm: str, reward: str) -> pd.Series:
    """Gains of the cells that were trained on this reward, in it."""
    cells = [*(run / "cells").glob(f"{arm}--{reward}--*"), run / "cells" / "base"]
    table = pd.concat([pd.read_parquet(cell / "scores.parquet") for cell in cells])
    table = table[(table["point"] == "final") & (table["split"] == "held-out") & (table["reward"] == reward)]
    wide = table.pivot_table(index=["prompt_id", "noise_id"], columns=["arm", "seed"], values="score")
    return wide[arm].sub(wide[("base", -1)], axis=0).groupby("prompt_id").mean().mean()


def test_one_seed_is_no_evidence(tmp_path: Path) -> None:
    """A loss of four margins with one seed is inconclusive; with a method that has no seed variance it is WORSE."""
    old = made(tmp_path / "old", seeds=1)
    new = shifted(Path(shutil.copytree(old, tmp_path / "new")), -0.4 * base_sd(old), "draft--*")
    found = row(compare(take(new), take(old)), "draft")
    for run in (old, new):
        edit_json(run / "run.json", lambda plan: plan["arms"][0].update(seeded=False))

    assert found.outcome is GateOutcome.INCONCLUSIVE
    assert "n=1" in found.note
    assert row(compare(take(new), take(old)), "draft").outcome is GateOutcome.WORSE


def test_the_unit_is_the_baselines(new: Path, old: Path) -> None:
    """A base model whose pictures vary more today makes no loss smaller."""
    now = take(shifted(new, -0.4 * base_sd(old), "draft--*", spread=0.02))
    wider = replace(now, base_sd={name: 9 * sd for name, sd in now.base_sd.items()})

    assert row(compare(wider, once(old)), "draft") == row(compare(now, once(old)), "draft")


def test_pictures_are_matched_where_one_run_never_had_some(new: Path, old: Path) -> None:
    """No cell of the new run has the first picture, so that all others stand one place earlier than in the baseline."""
    shifted(new, -0.5, "draft--*", spread=0.05)
    edit_scores(new, lambda s: s[(s["prompt_id"] != "he-00") | (s["noise_id"] != 0)])
    found = row(compared(new, old), "draft")
    keep = {(f"he-{p:02d}", n) for p in range(10) for n in range(2)} - {("he-00", 0)}
    difference = (seed_gains(new, "draft", keep=keep) - seed_gains(old, "draft", keep=keep)) / base_sd(old)

    assert found.difference.estimate == pytest.approx(float(difference.mean()))
    assert found.difference.standard_error == pytest.approx(float(stats.sem(difference)))
