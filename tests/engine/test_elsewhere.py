"""Adapters and pictures made elsewhere are judged as trained arms are: the same pictures get the same scores."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from harness import benchmark, store
from harness.config import resolve
from harness.elsewhere import Wanted, settings
from harness.errors import UserError
from harness.grid import Grid
from harness.report.build import build_report
from tests.engine.fakes import Bench, plugin_file, run_inline

KEY = ["split", "prompt_id", "noise_id", "reward"]
Evaluate = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, pipeline_directory: Path) -> Bench:
    """A run of draft on the tiny pipeline: its cells are what was made elsewhere."""
    folder = tmp_path_factory.mktemp("elsewhere")
    bench = Bench(folder, plugin_file(folder / "plugins"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "run_cells", run_inline)
        patch.setattr("harness.report.build.build_report", lambda run_dir, out=None: run_dir)
        bench.run("trained", model=str(pipeline_directory), methods=["draft"], settings=LEARNING)
    return bench


LEARNING = {"draft": {"optimizer": {"learning_rate": 0.1}}}


@pytest.fixture
def evaluate(made: Bench, pipeline_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Evaluate what is wanted with the settings of the trained run, in this process."""
    monkeypatch.setattr(benchmark, "run_cells", run_inline)
    monkeypatch.setattr("harness.report.build.build_report", lambda run_dir, out=None: run_dir)
    monkeypatch.setattr(Grid, "build_training_rewards", None)  # nothing is trained: judges are loaded once

    def run(out: str, into: Path | None = None, weights: dict[str, str] | None = None, **wanted: Any) -> Path:
        from tests.engine.fakes import settings as small

        asked = Wanted(**{"adapters": (), "folders": (), "prompts": None, "scales": "1", "rewards": ("all",), **wanted})
        common = small(made.plugins, made.folder / out, model=str(pipeline_directory))
        kept = ("model", "preset", "budget", "evaluation", "out")
        flags = {} if into else {key: common[key] for key in kept}
        flags |= {"device": "cpu", "workers": 1, "reward_weights": weights or {}}
        passed = settings(asked, flags, {}, into)
        return benchmark.run_benchmark(resolve(passed), passed)

    return run


def cells(run: Path, start: str) -> Path:
    """The only cell whose name starts so."""
    (found,) = [path for path in (run / "cells").iterdir() if path.name.startswith(start)]
    return found


def final(cell: Path, rewards: set[str] | None = None) -> pd.Series:
    """Final scores by prompt, latent and reward."""
    rows = pd.read_parquet(cell / "scores.parquet").query("point == 'final' and variant == 'default'")
    scores = rows.set_index(KEY)["score"].sort_index()
    return scores if rewards is None else scores[scores.index.get_level_values("reward").isin(rewards)]


def prompts_of(cell: Path, to: Path) -> Path:
    """A prompts file for the stored pictures of a cell."""
    texts = pd.read_parquet(cell / "scores.parquet").drop_duplicates("prompt_id").set_index("prompt_id")["prompt"]
    with to.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "prompt"])
        for path in sorted((cell / "images" / "final").iterdir()):
            rows.writerow([path.name, texts[path.name.rpartition("--")[0]]])
    return to


def test_an_adapter_scores_what_its_training_run_recorded(made: Bench, evaluate: Evaluate) -> None:
    """Loaded from its export, on the same noise bank, it has the same scores; at strength 0 the base model's."""
    trained = cells(made.folder / "trained", "draft")
    reward = made.reward("Quadratic")
    run = evaluate("again", adapters=(f"mine={trained / 'adapter'}",), scales="0,1", rewards=(reward, "jpeg-bytes"))
    once, off = final(cells(run, "mine-x1"), {reward}), final(cells(run, "mine-x0"))
    expected = final(trained, {reward})
    assert len(expected) == 10
    pd.testing.assert_series_equal(once, expected, atol=1e-4, rtol=0)
    pd.testing.assert_series_equal(off, final(run / "cells" / "base"))
    assert (once - off[once.index]).abs().max() > 0.005
    plan = store.read_json(run / "run.json")
    assert [arm["kind"] for arm in plan["arms"]] == ["given", "given"]
    assert {"jpeg-bytes", reward} <= {row["name"] for row in plan["rewards"]}
    status = store.read_json(cells(run, "mine-x1") / "status.json")
    assert status["kind"] == "given"
    assert status["generation_cost"]["queries"] == 0
    assert status["generation_cost"]["forward_rows"] > 0


def test_an_adapter_beside_trained_methods(made: Bench, evaluate: Evaluate, tmp_path: Path) -> None:
    """With --into it joins the run's tables, whose cells stay as they are; the same content elsewhere is the same."""
    run = shutil.copytree(made.folder / "trained", tmp_path / "joined")
    trained = cells(run, "draft")
    before, planned = (trained / "scores.parquet").read_bytes(), store.read_json(run / "run.json")
    copied = shutil.copytree(trained / "adapter", tmp_path / "copied")
    evaluate("", into=run, adapters=(f"mine={copied}",))
    assert (trained / "scores.parquet").read_bytes() == before
    plan = store.read_json(run / "run.json")
    assert [(arm["label"], arm["kind"]) for arm in plan["arms"]] == [("draft", "training"), ("mine", "given")]
    assert [plan[key] for key in KEPT] == [planned[key] for key in KEPT]
    pd.testing.assert_series_equal(final(cells(run, "mine")), final(trained), atol=0.05, rtol=0.02)
    moved = copied.rename(tmp_path / "moved")
    evaluate("", into=run, adapters=(f"mine={moved}",))
    with pytest.raises(UserError, match=r"the run trained on .*'jpeg-bytes' is none"):
        evaluate("", into=run, adapters=(f"mine={moved}",), rewards=("jpeg-bytes",))
    with pytest.raises(UserError, match="has an arm 'draft' of its own"):
        evaluate("", into=run, adapters=(f"draft={moved}",))


KEPT = ("config", "passed", "seeds", "reference_arm", "training_rewards")


@pytest.mark.parametrize("preset", ["over-optimisation", "generalisation", "truncation"])
def test_what_a_preset_says_of_its_own_arms_is_left_out(preset: str, tmp_path: Path) -> None:
    """Reference, mixes, variants and claims are about arms that are not there; what judges the base model stays."""
    ran = resolve({"preset": preset})
    plan = {"config": ran.model_dump(mode="json"), "arms": [], "training_rewards": list(ran.rewards)}
    store.write_json(tmp_path / "run.json", plan)
    wanted = Wanted((f"mine={tmp_path}",), (), None, "1", ("all",))
    flags: dict[str, Any] = {"reward_weights": {}}
    joined = resolve(settings(wanted, flags, {}, tmp_path))
    alone = resolve(settings(wanted, {**flags, "preset": preset}, {}, None))
    for config in (joined, alone):
        assert [arm.label for arm in config.all_arms()] == ["mine"]
        assert (config.reference, config.mixes, config.variants, config.findings) == (None, (), (), ())
    kept = ("model", "suite", "sampler", "evaluation", "early_stopping", "probes", "rewards", "denoiser", "adapter")
    assert [getattr(joined, key) for key in kept] == [getattr(ran, key) for key in kept]
    assert (alone.early_stopping, alone.probes) == (None, ())


def test_an_adapter_is_labelled_by_its_place(tmp_path: Path) -> None:
    """A folder by its whole name, a file without its suffix; diffusers' file by the folder that it is in."""
    folder = tmp_path / "fox-v1.5"
    folder.mkdir()
    files = [folder / "pytorch_lora_weights.safetensors", folder / "wolf.safetensors"]
    for file in files:
        file.touch()
    wanted = Wanted(tuple(map(str, (folder, *files))), (), None, "1", ("jpeg-bytes",))
    arms = settings(wanted, {"reward_weights": {}}, {}, None)["arms"]
    assert [arm["label"] for arm in arms] == ["fox-v1.5", "fox-v1.5", "wolf"]


def test_pictures_score_what_they_scored(made: Bench, evaluate: Evaluate, tmp_path: Path) -> None:
    """A folder of the run's own pictures has exactly the run's scores, and no drift or cost."""
    trained = cells(made.folder / "trained", "draft")
    reward = made.reward("Quadratic")
    folder = trained / "images" / "final"
    prompts = prompts_of(trained, tmp_path / "prompts.csv")
    run = evaluate("pictures", folders=(f"shown={folder}",), prompts=prompts, rewards=(reward,))
    cell = cells(run, "shown")
    pd.testing.assert_series_equal(final(cell, {reward}), final(trained, {reward}))
    assert not (cell / "latents.npz").exists()
    assert not store.read_json(cell / "status.json")["generation_cost"]
    report = build_report(run, tmp_path / "report").read_text(encoding="utf-8")
    assert "made elsewhere" in report
    rows = prompts.read_text(encoding="utf-8").splitlines()
    prompts.write_text("\n".join([*rows, "another.png,another"]), encoding="utf-8")
    with pytest.raises(UserError, match="prompts_sha256"):  # other prompts are not the scores that are there
        evaluate("pictures", folders=(f"shown={folder}",), prompts=prompts, rewards=(reward,))


def test_pictures_that_do_not_fit(made: Bench, evaluate: Evaluate, tmp_path: Path) -> None:
    """Too few, without prompts, or of several sizes: said before anything is generated."""
    trained = cells(made.folder / "trained", "draft")
    folder = shutil.copytree(trained / "images" / "final", tmp_path / "shown")
    prompts = prompts_of(trained, tmp_path / "prompts.csv")
    with pytest.raises(UserError, match="--images needs --prompts"):
        evaluate("x", folders=(str(folder),))
    first = min(folder.iterdir())
    Image.open(first).resize((8, 8)).save(first)
    evaluated = {"folders": (str(folder),), "prompts": prompts, "rewards": ("jpeg-bytes",)}
    with pytest.raises(UserError, match=r"several sizes \(8x8, 16x16\)"):
        evaluate("sizes", **evaluated)
    first.unlink()
    with pytest.raises(UserError, match=r"fewer than 2 pictures of 1 of the 5 prompts"):
        evaluate("few", **evaluated)


def test_all_judges_have_an_order() -> None:
    """What can be trained on comes before what only judges: the first is what the report is about."""
    passed = settings(Wanted(("a",), (), None, "1", ("all",)), {"reward_weights": {}, "model": "emoji"}, {}, None)
    judges = [*passed["rewards"], *passed["evaluation_rewards"]]
    assert judges[:2] == ["emoji-3d", "emoji-clip"]
    assert judges[-2:] == ["background-accuracy", "object-accuracy"]


def test_what_cannot_be_evaluated(made: Bench, evaluate: Evaluate, tmp_path: Path) -> None:
    """Nothing, something that is not there, a file that is no adapter, a setting of the run that is joined."""
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate("x")
    with pytest.raises(UserError, match="does not exist"):
        evaluate("x", adapters=("mine=nowhere/at/all",), rewards=("jpeg-bytes",))
    with pytest.raises(UserError, match="write numbers"):
        evaluate("x", adapters=("mine=a",), scales="full", rewards=("jpeg-bytes",))
    with pytest.raises(UserError, match="names no reward"):
        evaluate("x", adapters=("mine=a",), rewards=())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=str(empty)):
        evaluate("x", adapters=(f"mine={empty}",), rewards=("jpeg-bytes",))
    run = made.folder / "trained"
    wanted = Wanted(("a",), (), None, "1", ("all",))
    with pytest.raises(UserError, match=r"suite is that of the run"):
        settings(wanted, {"suite": "animals", "reward_weights": {}}, {}, run)
