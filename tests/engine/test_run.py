"""What a run records, and that records can be trusted: pictures, curves, budgets, splits and randomness."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from harness import store
from harness.api import Prompt
from harness.cell import request_stream
from harness.config import resolve
from harness.errors import UserError
from harness.executors.local import run_cells
from harness.grid import Grid
from harness.metrics.appearance import AXES
from harness.registry import load_reward, load_suite, reward_names
from tests.engine.fakes import Bench, assert_same_cell, assert_same_run, settings, updates

README = Path(__file__).resolve().parents[2] / "results" / "README.md"


def cell(run: Path, arm: str, name: str = "") -> Path:
    """The only cell of an arm (and of a reward of that class, and of a seed)."""
    (found,) = [path for path in (run / "cells").iterdir() if path.name.startswith(arm) and name in path.name]
    return found


def test_records_have_the_documented_schema(bench: Bench) -> None:
    """Every cell has the columns, types and files that results/README.md documents, and the base is a cell."""
    run = bench.run()
    readme = README.read_text(encoding="utf-8")
    assert bench.ran[0] == "base"
    assert len(bench.ran) == len(store.read_json(run / "run.json")["cells"]) == 3
    for path in (run / "cells").iterdir():
        for file, schema in (("scores", store.SCORE_COLUMNS), ("metrics", store.METRIC_COLUMNS)):
            frame = pd.read_parquet(path / f"{file}.parquet")
            assert len(frame)
            assert {name: str(kind) for name, kind in frame.dtypes.items()} == schema
            assert all(f"`{name}`" in readme for name in schema)
        status = store.read_json(path / "status.json")
        assert status["state"] == "completed"
        assert all(f"`{key}`" in readme for key in status)
        trained = path.name != "base"
        assert (path / "updates.jsonl").exists() == (path / "adapter").exists() == trained
        assert not [file for file in path.iterdir() if f"{file.name.split('.')[0]}" not in readme]
    base = pd.read_parquet(run / "cells" / "base" / "scores.parquet")
    assert set(zip(base["arm"], base["method"], base["training_reward"], base["seed"], base["point"], strict=True)) == {
        ("base", "base", "", -1, "final")
    }


def test_gains_are_differences_of_identical_pairs(bench: Bench) -> None:
    """Every cell is scored on the base's (prompt, latent) pairs at the end, and on a subset of them on the way."""
    run = bench.run()
    key = ["split", "prompt_id", "noise_id", "reward"]
    base = pd.read_parquet(run / "cells" / "base" / "scores.parquet").set_index(key)
    assert base.index.is_unique
    assert set(base.index.get_level_values("split")) == {"training", "held-out"}
    for arm in ("draft", "ddpo"):
        scores = pd.read_parquet(cell(run, arm) / "scores.parquet")
        final = scores[(scores["point"] == "final") & (scores["variant"] == "default")].set_index(key)
        assert list(final.index) == list(base.index)
        curve = scores[scores["point"] == "8"].set_index(key)
        assert set(curve.index) < set(base.index)
        assert set(curve.index.get_level_values("split")) == {"held-out"}
        own = scores[scores["variant"] != "default"].set_index([*key, "variant"])
        assert own.index.is_unique
        assert set(own.index.droplevel("variant")) <= set(base.index)
        variants = {"own-sampler", "own-sampler-base"} if arm == "ddpo" else set()
        assert set(own.index.get_level_values("variant")) == variants
        metrics = pd.read_parquet(cell(run, arm) / "metrics.parquet")
        final_metrics = set(metrics.loc[metrics["point"] == "final", "metric"])
        assert final_metrics == {"vendi", "pairwise_distance", "drift_latent_rms", *AXES}


def test_drift_is_that_of_the_prompt_it_is_filed_under(bench: Bench) -> None:
    """Drift is paired by prompt also where the first reward has no score for some prompts."""
    run = bench.run(rewards=[bench.reward("Fragile")], methods=["draft"])
    latents = [np.load(path / "latents.npz")["latents"] for path in (cell(run, "draft"), cell(run, "base"))]
    expected = np.sqrt(((latents[0] - latents[1]).astype(np.float64) ** 2).mean((1, 2, 3))).reshape(-1, 2).mean(1)
    suite = store.read_json(run / "run.json")["suite"]["evaluated"]
    metrics = pd.read_parquet(cell(run, "draft") / "metrics.parquet")
    mine = metrics[(metrics["metric"] == "drift_latent_rms") & (metrics["point"] == "final")]
    drift = mine.set_index("prompt_id")["value"]
    assert list(drift.index) == [*suite["training"], *suite["held-out"]]
    np.testing.assert_allclose(drift.to_numpy(), expected, rtol=1e-6)


def test_a_curve_point_is_where_the_budget_reaches_it(bench: Bench) -> None:
    """A point is evaluated after the first iteration that reaches it, and filed with what was really spent."""
    run = bench.run(methods=["draft"], budget={"amount": 15, "curve_points": [3, 4, 9]})
    scores = pd.read_parquet(cell(run, "draft") / "scores.parquet")
    spent = scores.groupby("point", sort=False)[["iteration", "queries"]].agg(lambda column: sorted(set(column)))
    assert spent["iteration"].to_dict() == {"4": [2], "9": [5], "final": [7]}
    assert spent["queries"].to_dict() == {"4": [4], "9": [10], "final": [14]}


def test_evaluation_is_no_part_of_what_training_spends(bench: Bench) -> None:
    """Every iteration adds the same counts, also after a curve point, and the totals are those of the last one."""
    run = bench.run()
    for arm in ("draft", "ddpo"):
        cost, log = store.read_json(cell(run, arm) / "status.json")["cost"], updates(cell(run, arm))
        for key in ("forward_rows", "gradient_rows", "backward_rows", "decodes", "queries"):
            assert [line[key] for line in log] == [log[0][key] * (i + 1) for i in range(len(log))]
            assert cost[key] == log[-1][key]
        scores = pd.read_parquet(cell(run, arm) / "scores.parquet")
        assert set(scores[scores["point"] == "final"]["denoiser_rows"]) == {cost["denoiser_rows"]}


@pytest.mark.parametrize(("amount", "components"), [(15, 1), (16, 1), (15, 2)])
def test_a_cell_never_spends_more_than_its_budget(bench: Bench, amount: int, components: int) -> None:
    """It stops before the iteration that could exceed the budget; each component reward is a query of its own."""
    reward = "+".join(f"{weight}*{bench.reward('Quadratic')}" for weight in (1, 2)[:components])
    run = bench.run(rewards=[reward], budget={"amount": amount, "curve_points": []})
    for arm, pictures in (("draft", 2), ("ddpo", 4)):
        path, step = cell(run, arm), pictures * components
        queries = store.read_json(path / "status.json")["cost"]["queries"]
        assert queries == amount // step * step <= amount
        assert [line["queries"] for line in updates(path)] == [step * (i + 1) for i in range(amount // step)]


def test_an_impossible_arm_is_refused_before_anything_is_spent(bench: Bench) -> None:
    """A budget below one iteration, or a setting that a method refuses, is one sentence, and no cell is started."""
    with pytest.raises(UserError, match="does not pay for one iteration"):
        bench.run(methods=["draft"], budget={"amount": 1, "curve_points": []})
    with pytest.raises(UserError, match="exceeds the sampler's"):
        bench.run(methods=["draft-k"], settings={"draft-k": {"k": 99}})
    assert not (bench.folder / "run" / "cells").exists()


def test_held_out_prompts_never_reach_a_method(bench: Bench) -> None:
    """A method is given training prompts alone: every one of them, none of validation and none held out."""
    run = bench.run(methods=[f"{bench.plugins}:Spy"], budget={"amount": 120, "curve_points": []})
    assert store.read_json(cell(run, "plugins") / "status.json")["state"] == "completed"
    seen = [line.split()[0] for line in bench.plugins.with_name("seen.txt").read_text(encoding="utf-8").splitlines()]
    assert len(seen) == 120
    assert set(seen) == {prompt.id for prompt in load_suite("animals").training}


def test_the_stream_of_a_seed_is_one_for_all_and_can_be_entered_anywhere() -> None:
    """Requests depend on the seed and their number alone, so that methods and resumed runs read the same ones."""
    prompts = [Prompt(f"p{i}", f"a picture of {i}") for i in range(5)]
    whole, late, other = (request_stream(prompts, (3, 1, 1), seed, start) for seed, start in ((0, 0), (0, 7), (1, 0)))
    first = [next(whole) for _ in range(20)]
    for expected, request in zip(first[7:], late, strict=False):
        assert (request.prompt, request.noise_id) == (expected.prompt, expected.noise_id)
        assert torch.equal(request.noise, expected.noise)
    assert sorted(request.prompt.id for request in first[:5]) == sorted(prompt.id for prompt in prompts)
    assert not torch.equal(first[0].noise, next(other).noise)


def test_the_noise_of_an_evaluation_is_one_for_all(bench: Bench) -> None:
    """Where steps have noise, too, an adapter of strength 0 is the base, whoever trained it and with which sampler."""
    noisy = bench.run("noisy", methods=["draft"], sampler={"eta": 1.0}, variants=[{"lora_scale": 0.0}])
    calm = bench.run("calm", methods=["ddpo"])  # trains with eta 1, and is evaluated with it as well
    key = ["prompt_id", "noise_id"]

    def scores(run: Path, arm: str, variant: str) -> pd.Series:
        table = pd.read_parquet(cell(run, arm) / "scores.parquet")
        chosen = (table["variant"] == variant) & (table["point"] == "final")
        return table[chosen & table["reward"].str.endswith("Quadratic")].set_index(key)["score"]

    base = scores(noisy, "base", "default")
    for run, arm, variant in ((noisy, "draft", "lora-scale=0"), (calm, "ddpo", "own-sampler-base")):
        off = scores(run, arm, variant)
        assert len(off) >= 3
        np.testing.assert_array_equal(off, base[off.index])
        for other in (scores(noisy, "draft", "default"), scores(calm, "base", "default")):
            assert not np.array_equal(off, other[off.index])


def test_scoring_the_stored_picture_gives_the_record(bench: Bench, pipeline_directory: Path) -> None:
    """A fresh reward on the PNG gives the recorded score, for every picture and reward of a pipeline's run."""
    run = bench.run(model=str(pipeline_directory), methods=["draft-k"], budget={"amount": 4, "curve_points": []})
    names = [bench.reward("Quadratic"), *reward_names("any")]
    rewards = {name: load_reward(name)(torch.device("cpu")) for name in names}
    for path in (cell(run, "base"), cell(run, "draft-k")):
        scores = pd.read_parquet(path / "scores.parquet")
        assert set(scores["reward"]) == set(names)
        for row in scores.itertuples():
            pixels = np.asarray(Image.open(path / "images" / "final" / f"{row.prompt_id}--{row.noise_id}.png"))
            picture = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]
            score = float(rewards[str(row.reward)](picture, [Prompt(str(row.prompt_id), str(row.prompt))]))
            assert score == pytest.approx(row.score, rel=1e-5, abs=1e-6)


def test_records_depend_neither_on_workers_nor_on_processes(bench: Bench) -> None:
    """Two worker processes leave bit by bit what one loop in one process leaves, a diverged cell included."""
    rewards = [bench.reward("Quadratic"), bench.reward("Brightness")]
    changes: dict[str, Any] = {"rewards": rewards, "settings": {"draft": {"learning_rate": 0.3}}}
    alone = bench.run("alone", **changes)
    config = resolve(settings(bench.plugins, bench.folder / "two", **changes, workers=2))
    cells = Grid(config).cells
    ends = run_cells(config, bench.folder / "two", cells, 2, lambda event: None)
    assert ends == {c.cell: store.read_json(alone / "cells" / c.cell / "status.json")["state"] for c in cells}
    assert "diverged" in ends.values()
    bench.run("two", **changes)
    assert bench.ran == []
    assert_same_run(bench.folder / "two", alone)


def poisoned(*arguments: Any, **keywords: Any) -> Any:
    """What a global random generator does in the test below."""
    raise AssertionError("a global random generator was asked for numbers")


def unless_own(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that works only with a generator of the caller's own."""

    def guarded(*arguments: Any, **keywords: Any) -> Any:
        if keywords.get("generator") is None:
            poisoned()
        return original(*arguments, **keywords)

    return guarded


def test_a_run_works_with_poisoned_global_generators(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is drawn from the global generators of torch, numpy and random, and their states stay as they are."""
    for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"):
        monkeypatch.setattr(torch, name, unless_own(getattr(torch, name)))
    for name in ("rand_like", "randn_like", "randint_like", "manual_seed", "seed"):
        monkeypatch.setattr(torch, name, poisoned)
    for name in ("normal_", "uniform_", "bernoulli_", "exponential_", "random_"):
        monkeypatch.setattr(torch.Tensor, name, unless_own(getattr(torch.Tensor, name)))
    for name in ("random", "rand", "randn", "randint", "normal", "uniform", "choice", "shuffle", "permutation", "seed"):
        monkeypatch.setattr(np.random, name, poisoned)
    for name in ("random", "randint", "choice", "shuffle", "gauss", "uniform", "sample", "seed"):
        monkeypatch.setattr(random, name, poisoned)
    run = bench.run("poisoned", methods=["draft", "draft-k", "draft-lv", "refl", "ddpo", "ddpo-sf"])
    assert len(bench.ran) == 7
    assert {store.read_json(path / "status.json")["state"] for path in (run / "cells").iterdir()} == {"completed"}


def test_global_generators_change_nothing_and_stay_unchanged(bench: Bench, pipeline_directory: Path) -> None:
    """A pipeline's run gives the same records whatever the global states are, and leaves these states alone."""
    records = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what is tested
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        changes = {"model": str(pipeline_directory), "methods": ["ddpo"], "budget": {"amount": 4, "curve_points": []}}
        records.append(bench.run(str(seed), **changes))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
        assert random.getstate() == states[2]
    assert_same_cell(cell(records[0], "ddpo"), cell(records[1], "ddpo"))
