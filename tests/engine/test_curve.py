"""What is recorded along the curve: metrics and pictures of its points, the base model on the same pairs, warnings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from harness import store
from harness.api import Prompt
from harness.base_reference import BaseReference, base_reference
from harness.config import EarlyStoppingConfig, resolve
from harness.curve import PROMPTS_SHOWN
from harness.early_stopping import EarlyStopping
from harness.errors import UserError
from harness.evaluation import Evaluated, Score
from harness.grid import Grid
from harness.metrics.appearance import AXES, appearance
from harness.progress import status_lines
from harness.watching import watch_cell
from harness.workshop import Workshop
from tests.engine.fakes import Bench, assert_same_cell, assert_same_run, settings
from tests.engine.test_run import cell

EVALUATION = {
    "prompts": {"training": 3, "held-out": 6},
    "latents": 3,
    "curve_latents": 2,
    "diversity_prompts": 1,
    "diversity_latents": 2,
    "batch": 8,
}
GAMED = {"evaluation": EVALUATION, "settings": {"draft": {"learning_rate": 0.3}}, "methods": ["draft"]}
ALONG = {"pairwise_distance", "vendi", "drift_latent_rms", *AXES}


def metrics(directory: Path) -> pd.DataFrame:
    """The metrics of a cell."""
    return pd.read_parquet(directory / "metrics.parquet")


def test_points_have_metrics_and_pictures(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each point and the end have all metrics of every held-out prompt; pictures are those of the first prompts."""
    assert PROMPTS_SHOWN == 12
    monkeypatch.setattr("harness.curve.PROMPTS_SHOWN", 4)
    run = bench.run(**GAMED)
    directory = cell(run, "draft")
    table = metrics(directory)
    held_out = store.read_json(run / "run.json")["suite"]["evaluated"]["held-out"]
    for point in ("8", "end"):
        rows = table[table["point"] == point]
        assert set(rows["metric"]) == ALONG
        assert all(list(found["prompt_id"]) == held_out for _, found in rows.groupby("metric"))
        assert set(rows["n"]) == {2}
    final = table[table["point"] == "final"]
    assert set(final["metric"]) == ALONG
    assert set(final.loc[final["metric"].isin([*AXES, "drift_latent_rms"]), "n"]) == {3}
    base = metrics(run / "cells" / "base")
    assert set(base.loc[base["point"] == "0", "metric"]) == ALONG - {"drift_latent_rms"}
    assert set(base.loc[base["point"] == "final", "metric"]) == ALONG - {"drift_latent_rms"}
    names = sorted(path.name for path in (directory / "images" / "8").iterdir())
    assert names == sorted(f"{prompt}--0.png" for prompt in held_out[:4])
    assert not (directory / "points").exists()
    bare = bench.run("bare", **GAMED, keep_images="none")
    assert not list(bare.rglob("*.png"))
    pd.testing.assert_frame_equal(metrics(cell(bare, "draft")), table, check_exact=True)


def test_metrics_are_those_of_the_stored_pictures_and_latents(bench: Bench) -> None:
    """At the end, from the files alone: appearance by prompt, drift, and both again on the curve's two latents."""
    run = bench.run(**GAMED)
    directory, base = cell(run, "draft"), run / "cells" / "base"
    table, evaluated = metrics(directory), store.read_json(run / "run.json")["suite"]["evaluated"]
    order = [(prompt, k) for split in ("training", "held-out") for prompt in evaluated[split] for k in range(3)]
    latents = [np.load(path / "latents.npz")["latents"].astype(np.float64) for path in (directory, base)]
    drift = np.sqrt(((latents[0] - latents[1]) ** 2).mean(axis=(1, 2, 3)))
    prompt = evaluated["held-out"][5]
    for point, kept in (("final", (0, 1, 2)), ("end", (0, 1))):
        mine = table[(table["prompt_id"] == prompt) & (table["point"] == point)].set_index("metric")["value"]
        places = [order.index((prompt, k)) for k in kept]
        assert mine["drift_latent_rms"] == pytest.approx(drift[places].mean(), rel=1e-9)
        files = [directory / "images" / "final" / f"{prompt}--{k}.png" for k in kept]
        seen = appearance(np.stack([np.asarray(Image.open(file)) for file in files]))
        for axis in AXES:
            assert mine[axis] == pytest.approx(seen[axis].mean(), abs=1e-12)


def reference(bench: Bench, run: Path) -> BaseReference:
    """What a worker that begins now would compare with."""
    evaluator = Workshop(Grid(resolve(settings(bench.plugins, run, **GAMED)))).evaluator
    return base_reference(evaluator, run / "cells")


def test_the_base_is_the_same_read_or_made(bench: Bench) -> None:
    """A cell that begins before the base model's cell has ended has the same numbers, bit by bit."""
    run = bench.run(**GAMED)
    read, made = reference(bench, run), reference(bench, bench.folder / "nowhere")
    np.testing.assert_array_equal(read.latents, made.latents)
    assert len(made.latents) == 6 * 2
    key = ["split", "prompt_id", "noise_id", "reward"]
    stored, again = (
        dict(zip(r.scores[key].itertuples(index=False), r.scores["score"], strict=True)) for r in (read, made)
    )
    assert len(again) >= 6 * 2
    assert again.items() <= stored.items()
    for part in ("metric", "prompt_id", "value", "n"):
        assert list(read.metrics[part]) == list(made.metrics[part])
    directory = cell(run, "draft")
    apart = bench.folder / "apart" / "cells"
    shutil.copytree(run / "cells", apart)
    shutil.rmtree(apart / "base")
    shutil.rmtree(apart / directory.name)
    bench.run("apart", **GAMED)
    assert_same_run(bench.folder / "apart", run)


def warnings(run: Path) -> list[dict[str, Any]]:
    """The warnings in a run's log."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == "warning"]


def gaming(bench: Bench) -> dict[str, Any]:
    """Training on brightness, which a held-out reward punishes from the first step on."""
    rewards = {"rewards": [bench.reward("Brightness")], "evaluation_rewards": [bench.reward("Dimness")]}
    return {**GAMED, **rewards, "settings": {"draft": {"learning_rate": 0.02}}}


def test_over_optimisation_is_told_while_training_and_again_by_the_records(bench: Bench) -> None:
    """The log, `status` and the watch of the finished records name the same point, witness and numbers."""
    run = bench.run(**gaming(bench))
    directory = cell(run, "draft")
    found = warnings(run)
    name = bench.reward("Dimness")
    (warning,) = [w for w in found if w["witness"] == name]
    assert (warning["cell"], warning["point"], warning["since"]) == (directory.name, "8", "0")
    table, base = (pd.read_parquet(path / "scores.parquet") for path in (directory, run / "cells" / "base"))
    key = ["prompt_id", "noise_id"]
    now = table[(table["point"] == "8") & (table["reward"] == name)].set_index(key)["score"]
    before = base[(base["split"] == "held-out") & (base["reward"] == name)].set_index(key)["score"].loc[now.index]
    assert warning["fall"] == pytest.approx((before - now).mean())
    assert warning["fall"] > 0
    assert warning["rise"] > 0
    assert sum(f"WARNING: over-optimisation at point 8: {name}" in line for line in status_lines(run)) == 1
    plan = store.read_json(run / "run.json")
    again = watch_cell(
        table[table["split"] == "held-out"],
        metrics(directory),
        base[base["split"] == "held-out"],
        metrics(run / "cells" / "base").query("point == '0'"),
        training_reward=bench.reward("Brightness"),
        terms={bench.reward("Brightness"): 1.0},
        roles={reward["name"]: reward["role"] for reward in plan["rewards"]},
        latents=2,
        looks=2,
    )
    assert again.points == ("0", "8", "end")
    assert [dict(w.numbers, detail=w.sentence) for w in again.first_warnings] == [
        {key: value for key, value in line.items() if key not in ("time", "event", "cell")} for line in found
    ]
    assert not again.unrecorded


def test_a_point_without_metrics_is_not_recorded_and_no_obstacle(bench: Bench) -> None:
    """A cell that was begun by a version that took no metrics goes on: scores are watched, diversity is not."""
    run = bench.run(**gaming(bench))
    directory = cell(run, "draft")
    table, base = metrics(directory), metrics(run / "cells" / "base")
    for lacking in (table[table["point"] != "8"], table[table["point"] == "final"]):
        scores = [pd.read_parquet(path / "scores.parquet") for path in (directory, run / "cells" / "base")]
        seen = watch_cell(
            scores[0][scores[0]["split"] == "held-out"],
            lacking,
            scores[1][scores[1]["split"] == "held-out"],
            base[base["point"] == "0"],
            training_reward=bench.reward("Brightness"),
            terms={bench.reward("Brightness"): 1.0},
            roles={bench.reward("Dimness"): "held-out"},
            latents=2,
            looks=2,
        )
        assert seen.unrecorded == ("pairwise_distance",)
        assert [w.found.witness for w in seen.first_warnings] == [bench.reward("Dimness")]


def test_the_best_checkpoint_is_a_directory_of_its_own(bench: Bench) -> None:
    """It generates what early stopping was scored with, and `status` says which point it is of."""
    reward = bench.reward("Quadratic")
    changes = {
        **GAMED,
        "budget": {"amount": 12, "curve_points": [4, 8]},
        "settings": {"draft": {"learning_rate": 0.9}},
        "early_stopping": {"reward": reward, "prompts": 3, "latents": 2},
    }
    run = bench.run(**changes)
    directory = cell(run, "draft")
    kept = store.read_json(directory / "status.json")["kept"]
    table = pd.read_parquet(directory / "scores.parquet")
    means = table[table["split"] == "validation"].groupby("point")["score"].mean()
    assert (kept["reward"], kept["point"]) == (reward, means.idxmax())
    assert kept["value"] == pytest.approx(means.max())
    assert any(f"best by {reward}: point {kept['point']}, in adapter-best/" in line for line in status_lines(run))
    model = Workshop(Grid(resolve(settings(bench.plugins, run, **changes)))).model
    model.load_adapter(directory / kept["adapter"])
    loaded = {name: value.detach().clone() for name, value in model.adapter_parameters().items()}
    short = bench.run("short", **{**changes, "budget": {"amount": int(kept["point"]), "curve_points": []}})
    model.load_adapter(cell(short, "draft") / "adapter")
    for name, value in model.adapter_parameters().items():
        np.testing.assert_array_equal(loaded[name], value.detach())
    assert_same_cell(directory, cell(bench.run("again", **changes), "draft"))


def test_a_judge_without_validation_pictures_is_refused(bench: Bench) -> None:
    """A reward that applies to none of them would call every checkpoint equal."""
    stopping = {"reward": bench.reward("Never"), "prompts": 2, "latents": 1}
    rewards = {"rewards": [bench.reward("Quadratic")], "evaluation_rewards": [bench.reward("Never")]}
    with pytest.raises(Exception, match="1 of 2 cells crashed"):
        bench.run(**{**GAMED, **rewards, "early_stopping": stopping})
    (status,) = (store.read_json(path) for path in bench.folder.glob("run/cells/draft*/status.json"))
    assert "applies to none of the 2 validation pictures" in status["reason"]


def test_the_flag_refuses_what_is_trained_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best checkpoint by the training reward would be the most over-optimised one."""
    from harness.early_stopping import refuse_trained

    with pytest.raises(UserError, match="--keep-best emoji-3d: that is trained on"):
        refuse_trained("emoji-3d", ["2*emoji-3d+1*emoji-clip"])
    refuse_trained("emoji-3d-heldout", ["2*emoji-3d+1*emoji-clip"])


def test_a_fault_of_the_watch_costs_no_cell(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell ends with the records that it would have had, and the log says that nobody watched."""
    whole = bench.run("whole", **gaming(bench))

    def broken(*args: object, **named: object) -> None:
        raise ZeroDivisionError("no prompts")

    monkeypatch.setattr("harness.curve.watch_cell", broken)
    run = bench.run(**gaming(bench))
    assert_same_run(run, whole)
    told = [line["detail"] for line in warnings(run)]
    assert told == [
        f"the over-optimisation watch failed at point {point}: ZeroDivisionError: no prompts" for point in ("8", "end")
    ]
    assert any("WARNING: the over-optimisation watch failed" in line for line in status_lines(run))


def test_a_witness_that_scored_the_end_alone_is_not_recorded(bench: Bench) -> None:
    """A held-out reward that is added to a finished run scores stored pictures, of which curves have none."""
    named = gaming(bench)
    run = bench.run(**{**named, "evaluation_rewards": []})
    bench.run(**named)
    directory = cell(run, "draft")
    scores, base = (pd.read_parquet(path / "scores.parquet") for path in (directory, run / "cells" / "base"))
    seen = watch_cell(
        scores[scores["split"] == "held-out"],
        metrics(directory),
        base[base["split"] == "held-out"],
        metrics(run / "cells" / "base").query("point == '0'"),
        training_reward=bench.reward("Brightness"),
        terms={bench.reward("Brightness"): 1.0},
        roles={bench.reward("Dimness"): "held-out"},
        latents=2,
        looks=2,
    )
    assert set(scores.loc[scores["reward"] == bench.reward("Dimness"), "point"]) == {"final"}
    assert seen.unrecorded == (bench.reward("Dimness"),)


class Judge:
    """An evaluator whose scores are given beforehand, one for each point."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.model = SimpleNamespace(latent_shape=(1,))

    def pictures(self, generate: object, requests: list[Any]) -> tuple[None, None]:
        """None are looked at."""
        return None, None

    def score(self, pictures: None, evaluated: list[Evaluated], names: list[str]) -> list[Score]:
        """One for each."""
        value = self.values.pop(0)
        return [Score(e.split, e.request.prompt, e.request.noise_id, names[0], value) for e in evaluated]


@pytest.mark.parametrize(
    ("values", "best"),
    [([np.nan, 1.0, 2.0, 0.0], "2"), ([1.0, np.nan, 0.5], "0"), ([np.nan, np.nan], "0"), ([np.nan, -5.0, np.nan], "1")],
)
def test_a_point_without_a_number_is_never_the_best(values: list[float], best: str) -> None:
    """Unless none has one."""
    config = EarlyStoppingConfig(reward="r", prompts=1, latents=1)
    stopping = EarlyStopping(Judge(list(values)), config, [Prompt("p", "a cat", {})])  # type: ignore[arg-type]
    identity = {"cell": "c", "arm": "a", "method": "m", "training_reward": "r", "seed": 0}
    for k in range(len(values)):
        stopping.consider(None, {}, identity, {"iteration": k, "queries": 0.0}, str(k))  # type: ignore[arg-type]
    assert stopping.kept["point"] == best
