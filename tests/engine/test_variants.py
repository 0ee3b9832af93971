"""Variants of a trained cell: strength, last steps, early stopping; made later from what is stored, as if at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from harness.config import VariantConfig, parse_set, parse_variants, resolve
from harness.errors import UserError
from tests.engine.fakes import Bench, scores
from tests.engine.test_run import cell

HALF, LAST = {"lora_scale": 0.5}, {"lora_steps": 2}
KEY = ["variant", "point", "split", "prompt_id", "noise_id", "reward"]


def variant(run: Path, label: str, arm: str = "draft") -> pd.DataFrame:
    """The final scores of one variant by the training reward, by picture."""
    table = scores(cell(run, arm))
    table = table[table["reward"].str.endswith("Quadratic")]
    return table[(table["variant"] == label) & (table["point"] == "final")].set_index(KEY[2:]).sort_index()


def test_variants_are_other_strengths_of_the_same_adapter(bench: Bench) -> None:
    """On held-out prompts with all latents: strength 0 is the base, all steps are the default, others lie between."""
    ways = [{"lora_scale": 0.0}, HALF, LAST, {"lora_steps": 4}, {"lora_steps": 0}]
    run = bench.run(methods=["draft"], variants=ways, settings={"draft": {"learning_rate": 0.05}})
    base = variant(run, "default", "base")
    whole = variant(run, "default")
    half = variant(run, "lora-scale=0.5")
    assert set(half.index.get_level_values("split")) == {"held-out"}
    assert len(half) == 3 * 2
    for label in ("lora-scale=0", "lora-steps=0"):
        same = variant(run, label)["score"]
        np.testing.assert_array_equal(same, base.loc[same.index, "score"])
    same = variant(run, "lora-steps=4")["score"]
    np.testing.assert_array_equal(same, whole.loc[same.index, "score"])
    for label in ("lora-scale=0.5", "lora-steps=2"):
        between = variant(run, label)["score"]
        assert (between != whole.loc[between.index, "score"]).all()
        assert (between != base.loc[between.index, "score"]).all()
        assert base["score"].mean() < between.mean() < whole["score"].mean()


def test_a_variant_that_is_added_trains_nothing(bench: Bench) -> None:
    """It gives the records of a run that had it from the beginning; a reward that is added scores variants, too."""
    rewards = [bench.reward("Quadratic"), bench.reward("Fragile")]
    stopping = {"reward": rewards[0], "prompts": 2, "latents": 1}
    common = {"methods": ["draft"], "early_stopping": stopping}
    run = bench.run(rewards=rewards[:1], variants=[HALF], **common)
    adapters = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    bench.run(rewards=rewards[:1], variants=[HALF, LAST], **common)
    assert len(bench.ran) == 1
    bench.run(rewards=rewards, variants=[HALF, LAST], **common)
    once = bench.run("once", rewards=rewards, variants=[HALF, LAST], **common)
    late, whole = (scores(cell(path, "draft", "Quadratic")).set_index(KEY).sort_index() for path in (run, once))
    assert late.index.is_unique
    final = whole[whole.index.get_level_values("point") == "final"]
    assert set(final.index.get_level_values("variant")) == {
        "default", "lora-scale=0.5", "lora-steps=2", "early-stopping"
    }  # fmt: skip
    pd.testing.assert_frame_equal(late.loc[final.index], final, check_exact=True)
    assert adapters.items() <= {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}.items()
    bench.run(rewards=rewards, variants=[LAST], **common)
    assert bench.ran == []


def test_early_stopping_keeps_the_best_point_of_the_validation_prompts(bench: Bench) -> None:
    """The kept adapter, its place in training and its scores are those of the point with the best validation mean."""
    reward = bench.reward("Quadratic")
    budget = {"amount": 12, "curve_points": [4, 8]}
    # Steps so long that the last ones lead away again.
    rates = {"draft": {"learning_rate": 0.9}}
    stopping = {"reward": reward, "prompts": 3, "latents": 2}
    run = bench.run(methods=["draft"], budget=budget, settings=rates, early_stopping=stopping)
    table = scores(cell(run, "draft"))
    validation = table[table["split"] == "validation"]
    assert not set(validation["prompt_id"]) & set(table.loc[table["split"] != "validation", "prompt_id"])
    means = validation.groupby("point")["score"].mean()
    assert set(means.index) == {"4", "8", "final"}
    assert len(validation) == 3 * 3 * 2
    kept = variant(run, "early-stopping")
    best = validation[validation["point"] == means.idxmax()].iloc[0]
    assert means.idxmax() != "final"
    assert set(kept["iteration"]) == {best["iteration"]}
    judged = 3 * 2 * (["4", "8", "final"].index(means.idxmax()) + 1)
    assert set(kept["queries"]) == {best["queries"] + judged}
    stored = [
        load_file(cell(run, "draft") / "adapter" / f"{name}.safetensors") for name in ("early-stopping", "parameters")
    ]
    assert any((stored[0][name] != stored[1][name]).any() for name in stored[0])
    # The same training stopped there by its budget ends with the same adapter and the same scores.
    short = bench.run(
        "short", methods=["draft"], budget={"amount": int(best["queries"]), "curve_points": []}, settings=rates
    )
    ended = load_file(cell(short, "draft") / "adapter" / "parameters.safetensors")
    assert all((ended[name] == stored[0][name]).all() for name in ended)
    same = variant(short, "default")["score"]
    np.testing.assert_array_equal(kept["score"], same.loc[kept.index])


def test_impossible_variants_are_refused(bench: Bench) -> None:
    """With a message that says what is wrong, before anything runs."""
    with pytest.raises(UserError, match="lora-steps=9 exceeds the 4 steps"):
        bench.run(variants=[{"lora_steps": 9}])
    with pytest.raises(UserError, match="needs a lora_scale other than 1"):
        bench.run(variants=[{"lora_scale": 1.0}])
    with pytest.raises(UserError, match="'nothing' scores nothing in this run"):
        bench.run(early_stopping={"reward": "nothing"})


def test_the_command_line_names_variants_and_early_stopping() -> None:
    """Comma-separated strengths and steps are a variant each; early stopping is a section of the run's settings."""
    ways = parse_variants("0.5,0.75", "3")
    assert [VariantConfig.model_validate(way).label for way in ways] == [
        "lora-scale=0.5", "lora-scale=0.75", "lora-steps=3"
    ]  # fmt: skip
    with pytest.raises(UserError, match="write numbers"):
        parse_variants("half", "")
    given = parse_set(["early_stopping.reward=emoji-clip-heldout", "early_stopping.prompts=4"])
    stopping = resolve(given).early_stopping
    assert stopping is not None
    assert (stopping.reward, stopping.prompts) == ("emoji-clip-heldout", 4)


def test_a_label_says_all_of_a_variant() -> None:
    """So that two variants of one label are one."""
    assert VariantConfig(lora_scale=0.5, lora_steps=3).label == "lora-scale=0.5 lora-steps=3"
    assert VariantConfig(lora_steps=0).label == "lora-steps=0"


def test_an_arm_with_a_sampler_of_its_own_is_evaluated_with_it(bench: Bench) -> None:
    """Also with the adapter off; a reward that is added later is scored there, too, as if it had been there at once."""
    arms = [{"label": "long", "method": "draft", "overrides": {"sampler": {"steps": 7}}}]
    rewards = [bench.reward("Quadratic"), bench.reward("Fragile")]
    common = {"methods": [], "arms": arms, "settings": {"draft": {"learning_rate": 0.05}}}
    run = bench.run(rewards=rewards[:1], **common)
    own, off = (variant(run, label, "long")["score"] for label in ("own-sampler", "own-sampler-base"))
    assert len(own) == len(off) == 3
    usual = variant(run, "default", "long")["score"]
    assert (own != usual.loc[own.index]).all()
    assert off.mean() < own.mean()
    bench.run(rewards=rewards, **common)
    once = bench.run("once", rewards=rewards, **common)
    late, whole = (scores(cell(path, "long", "Quadratic")).set_index(KEY).sort_index() for path in (run, once))
    final = whole[whole.index.get_level_values("point") == "final"]
    assert late.index.is_unique
    pd.testing.assert_frame_equal(late.loc[final.index], final, check_exact=True)
