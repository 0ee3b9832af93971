"""Plans agree with the report of the run they come from, say what they cannot tell, and depend on the records alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import UserError
from harness.report.analysis import analyse
from harness.report.plan_text import describe
from harness.report.planning import Design, Plan, plan
from harness.report.records import load_run
from tests.report.synthetic import Made, grid_job, main_job, write_run


def made_plan(folder: Path, made: Made, difference: float = 0.2, **changes: Any) -> Plan:
    """The plan of a made-up run, arms changed in its run.json."""
    run = write_run(folder, made)
    path = run / "run.json"
    content = json.loads(path.read_text())
    for arm in content["arms"]:
        arm.update(changes.get(arm["label"].replace("-", "_"), {}))
    path.write_text(json.dumps(content))
    return plan(load_run(run), difference)


def test_what_the_run_could_find_is_what_its_report_says(tmp_path: Path) -> None:
    """The detectable differences of the primary and of the secondary family."""
    run = load_run(
        write_run(tmp_path, grid_job(images=False, diverged=(), no_scores=(), arms=("draft", "refl", "ddpo")))
    )
    found, analysis = plan(run, 0.2), analyse(run)
    assert found.design == Design(3, 10, 1)
    assert len(found.questions) == 2 * 4
    for question in found.questions:
        arm = question.name.split(" against ")[0]
        if question.strata:
            judged = next(j for j in analysis.primary if j.arm == arm)
        else:
            pairs = [j for j in analysis.secondary[question.reward] if {j.arm, j.reference} == {arm, "draft"}]
            (judged,) = pairs
        assert question.family == judged.family
        assert question.detectable(found.design, unseen=False) == pytest.approx(judged.detectable, rel=1e-6)


def test_needed_seeds_find_the_difference_and_one_less_does_not(tmp_path: Path) -> None:
    """Their own detectable difference is the edge; unseen prompts and assurance never need fewer."""
    found = made_plan(tmp_path, main_job(images=False, seed_sd=0.6), 0.5)
    (question,) = found.questions
    seeds = found.seeds(found.design, unseen=False)
    assert seeds is not None
    assert seeds > 4
    at, below = (Design(s, found.design.prompts, found.design.latents) for s in (seeds, seeds - 1))
    assert question.detectable(at, unseen=False) <= 0.5 < question.detectable(below, unseen=False)
    assured = question.seeds(0.5, found.design, unseen=False, holm=True, assured=True)
    assert assured is not None
    assert assured > seeds
    # Of two arms of five seeds: 4 to 8 degrees of freedom.
    assert question.contrast.inflation == pytest.approx(1.3, abs=0.15)
    unseen = question.seeds(0.5, found.design, unseen=True, holm=True, assured=False)
    assert unseen is None or unseen >= seeds


def test_a_permutation_test_needs_its_seeds_however_large_the_difference(tmp_path: Path) -> None:
    """Four seeds: with three, no relabelling has a p below .1."""
    found = made_plan(tmp_path, main_job(images=False), 50.0)
    assert found.seeds(found.design, unseen=False) == 4
    assert [q.strata for q in found.questions] == [1]


def test_an_arm_alone_is_planned_against_the_base(tmp_path: Path) -> None:
    """Its gain, with one side and a one-sample test."""
    found = made_plan(tmp_path, main_job(images=False, arms=("draft",)))
    (question,) = found.questions
    assert (question.name, question.reward, question.strata) == ("draft over base", "emoji-3d", 0)
    assert len(question.contrast.sides) == 1


def test_an_arm_without_seed_variance_shifts_the_other(tmp_path: Path) -> None:
    """One side only, whichever of the two is fixed; its single cell is no missing seed."""
    made = main_job(images=False, missing=tuple(f"ddpo--emoji-3d--seed{seed}" for seed in range(1, 5)))
    fixed = {"kind": "inference", "seeded": False}
    found = made_plan(tmp_path, made, ddpo=fixed)
    (question,) = found.questions
    assert question.name == "ddpo against draft"
    assert (len(question.contrast.sides), question.contrast.weights) == (1, (-1.0,))
    assert [cost.seeded for cost in found.costs] == [True, False]


def test_a_partial_run_answers_for_the_arms_that_have_two_seeds(tmp_path: Path) -> None:
    """The others are named; prompts and seeds are those that there are."""
    missing = tuple(f"refl--emoji-3d--seed{seed}" for seed in range(1, 5))
    made = main_job(images=False, arms=("draft", "ddpo", "refl"), missing=(*missing, "draft--emoji-3d--seed4"))
    found = made_plan(tmp_path, made)
    assert [question.name for question in found.questions] == ["ddpo against draft"]
    assert found.design.seeds == 4
    assert "refl has 1 seed(s) with scores" in describe(found)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (main_job(images=False, seeds=1), "no arm has two seeds"),
        (main_job(images=False, missing=("base",)), "base model is not scored"),
        (main_job(images=False, prompts={"training": ("a cat",), "held-out": ("a dog",)}), "one held-out prompt"),
    ],
)
def test_what_cannot_be_told_is_said(tmp_path: Path, made: Made, message: str) -> None:
    """With the remedy, and no traceback."""
    with pytest.raises(UserError, match=message):
        made_plan(tmp_path, made)


@pytest.mark.parametrize("difference", [0.0, -0.2, math.nan, math.inf])
def test_a_difference_is_above_zero(main_run: Path, difference: float) -> None:
    """Anything else is a mistake."""
    with pytest.raises(UserError, match="--detect"):
        plan(load_run(main_run), difference)


def test_arms_made_elsewhere_have_no_seeds(tmp_path: Path) -> None:
    """They are left out with the reason."""
    given = {"kind": "given", "seeded": False}
    found = made_plan(tmp_path, main_job(images=False), ddpo=given)
    assert [question.name for question in found.questions] == ["draft over base"]
    assert "ddpo was made elsewhere" in describe(found)


def test_the_cheapest_design_answers_and_costs_least(tmp_path: Path) -> None:
    """Among all multiples up to four, by hours that are summed here once more."""
    found = made_plan(tmp_path, main_job(images=False, seed_sd=0.3), 0.3)
    best = found.cheapest(unseen=False)
    assert best is not None
    costs = {}
    for prompts in (1, 2, 4):
        for latents in (1, 2, 4):
            larger = found.design.times(prompts=prompts, latents=latents)
            seeds = found.seeds(larger, unseen=False)
            assert seeds is not None
            extra = larger.pictures - found.design.pictures
            seconds = sum(seeds * (cost.seconds + extra * cost.seconds_per_picture) for cost in found.costs)
            costs[Design(seeds, larger.prompts, larger.latents)] = seconds / 3600
    assert found.hours(best) == pytest.approx(min(costs.values()))


def test_the_command_prints_the_same_for_shuffled_records(tmp_path: Path) -> None:
    """Identity, never position; and it names the numbers that a reader looks for."""
    made = main_job(images=False, seed_sd=0.3)
    texts = []
    for name, shuffle in (("a", None), ("b", 7)):
        run = write_run(tmp_path / name, made, shuffle=shuffle)
        done = CliRunner().invoke(app, ["plan", "--from", str(run), "--detect", "0.4"])
        assert done.exit_code == 0, done.output
        texts.append(done.output)
    assert texts[0] == texts[1]
    for words in ("ddpo against draft", "found by 5 seeds", "2 x prompts", "Unseen prompts", "worker hours"):
        assert words in texts[0]
