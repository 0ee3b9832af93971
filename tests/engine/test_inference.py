"""Methods that change no weights, beside one that does: their cells, costs, records, resume and report."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness import benchmark, store
from harness.api import UserError
from harness.config import resolve
from harness.estimate import describe_cost
from harness.grid import Grid
from harness.metrics.appearance import AXES
from harness.progress import status_lines
from harness.registry import discover
from harness.report.build import build_report
from tests.engine.fakes import Bench, assert_same_cell, plugin_file, run_inline, settings

N = 4
CHANGES: dict[str, Any] = {
    "methods": ["best-of-n", "draft", "prompt-search"],
    "seeds": [0, 1, 2],
    "settings": {"best-of-n": {"n": N}},
}
ROWS = 8  # of one chain: four steps with guidance


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A finished run, `run`, that the tests of this file read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "run_cells", run_inline)
        patch.setattr("harness.report.build.build_report", lambda run_dir, out=None: run_dir)
        folder = tmp_path_factory.mktemp("inference")
        bench = Bench(folder, plugin_file(folder / "plugins"))
        bench.run(**CHANGES)
        yield bench


def cells(run: Path, arm: str) -> list[Path]:
    """Directories of an arm's cells, by seed."""
    return sorted(path for path in (run / "cells").iterdir() if path.name.startswith(arm))


def latents(cell: Path) -> np.ndarray:
    """The final latents of a cell."""
    found: np.ndarray = np.load(cell / "latents.npz")["latents"]
    return found


def rewards(cell: Path) -> np.ndarray:
    """The training reward of the Gaussian's final pictures, which are the latents, unclamped."""
    return np.asarray(-((latents(cell).astype(np.float64) - 0.8) ** 2).mean((1, 2, 3)))


def test_seeds_are_cells_where_they_differ(place: Bench) -> None:
    """A method with randomness of its own has a cell for each seed, one without has one, seed 0."""
    run = place.folder / "run"
    assert [len(cells(run, arm)) for arm in ("best-of-n", "draft", "prompt-search", "base")] == [3, 3, 1, 1]
    assert cells(run, "prompt-search")[0].name.endswith("--seed0")
    seeds = {**settings(place.plugins, place.folder / "late", **CHANGES), "seeds": [3, 7]}
    found = [(cell.arm, cell.seed) for cell in Grid(resolve(seeds)).cells if cell.arm != "base"]
    assert sorted(found) == [("best-of-n", 3), ("best-of-n", 7), ("draft", 3), ("draft", 7), ("prompt-search", 0)]
    different = [latents(cell) for cell in cells(run, "best-of-n")]
    assert not np.array_equal(different[0], different[1])


def test_each_picture_s_cost_is_recorded(place: Bench) -> None:
    """What generation took for a picture, apart from what training took; nothing of the evaluation's own decoding."""
    run = place.folder / "run"
    for arm, kind, candidates in (("best-of-n", "inference", N), ("prompt-search", "inference", 8)):
        for cell in cells(run, arm):
            status = store.read_json(cell / "status.json")
            spent = {"forward_rows": candidates * ROWS, "denoiser_rows": candidates * ROWS}
            spent |= {"queries": candidates, "decodes": candidates}
            assert {key: count for key, count in status["generation_cost"].items() if count} == spent
            assert set(status["cost"].values()) == {0}
            assert (status["kind"], status["state"], status["iterations"]) == (kind, "completed", 0)
            assert store.read_json(cell / "identity.json")["training"]["kind"] == "inference"
    for arm, kind in (("draft", "training"), ("base", "base")):
        status = store.read_json(cells(run, arm)[0] / "status.json")
        spent = {"forward_rows": ROWS, "denoiser_rows": ROWS}
        assert {key: count for key, count in status["generation_cost"].items() if count} == spent
        assert status["kind"] == kind


def test_records_are_those_of_an_evaluation_alone(place: Bench) -> None:
    """On the base's pairs, without curve points, log of iterations and adapter; with diversity, drift and pictures."""
    run = place.folder / "run"
    key = ["split", "prompt_id", "noise_id", "reward"]
    base = pd.read_parquet(run / "cells" / "base" / "scores.parquet")
    for cell in (*cells(run, "best-of-n"), *cells(run, "prompt-search")):
        scores = pd.read_parquet(cell / "scores.parquet")
        assert scores[key].equals(base[key])
        assert set(scores["point"]) == {"final"}
        assert not scores[["iteration", "queries", "denoiser_rows", "train_seconds"]].to_numpy().any()
        metrics = pd.read_parquet(cell / "metrics.parquet")
        assert set(metrics["metric"]) == {"vendi", "pairwise_distance", "drift_latent_rms", *AXES}
        assert set(metrics["point"]) == {"end", "final"}
        assert {path.name for path in cell.iterdir()} == {
            "identity.json", "status.json", "scores.parquet", "metrics.parquet", "latents.npz", "images",
        }  # fmt: skip
    lines = [line for line in status_lines(run) if line.startswith(("best-of-n", "prompt-search"))]
    assert len(lines) == 4
    assert all("no training" in line for line in lines)


def test_the_base_model_s_pictures_are_chosen_from(place: Bench) -> None:
    """Best-of-N never falls below the base on any picture; where prompts do not matter their search changes nothing."""
    run = place.folder / "run"
    (base,) = cells(run, "base")
    for cell in cells(run, "best-of-n"):
        gain = rewards(cell) - rewards(base)
        assert gain.min() >= 0
        assert np.count_nonzero(gain) > len(gain) / 2
    assert np.array_equal(latents(cells(run, "prompt-search")[0]), latents(base))


def test_an_interrupted_cell_starts_again(place: Bench) -> None:
    """Without its last file a cell is made again, with the same records; a new seed adds cells where seeds differ."""
    copy = place.folder / "again"
    shutil.copytree(place.folder / "run", copy)
    (victim,) = cells(copy, "prompt-search")
    other = cells(copy, "best-of-n")[1]
    for cell in (victim, other):
        (cell / "status.json").unlink()
    (victim / "scores.parquet").unlink()
    place.run("again", **CHANGES)
    assert sorted(place.ran) == sorted([victim.name, other.name])
    for cell in (victim, other):
        assert_same_cell(cell, place.folder / "run" / "cells" / cell.name)
    place.run("again", **{**CHANGES, "seeds": [0, 1, 2, 3]})
    assert sorted(name.split("--")[0] for name in place.ran) == ["best-of-n", "draft"]
    assert all(name.endswith("seed3") for name in place.ran)


def test_the_report_tells_them_apart(place: Bench) -> None:
    """Every table marks methods that change no weights and says what a picture costs; a constant has no interval."""
    folder = place.folder / "report"
    text = build_report(place.folder / "run", folder).read_text(encoding="utf-8")
    assert "**best-of-n** †" in text
    assert "**prompt-search** †" in text
    assert "**draft** †" not in text
    assert "one value, no seed variance" in text
    assert "4 a picture" in text
    costs = pd.read_csv(folder / "table-costs.csv").groupby("arm")[["queries_per_picture", "denoiser_rows_per_picture"]]
    assert costs.mean().to_numpy().tolist() == [[N, N * ROWS], [0, ROWS], [8, 8 * ROWS]]
    tests = pd.read_csv(folder / "table-2-comparisons.csv").set_index("arm")["test"]
    assert tests.to_dict() == {"draft": "permutation", "prompt-search": "one-sample t"}
    headline = pd.read_csv(folder / "table-1-headline.csv").set_index("arm")
    assert np.isfinite(headline.loc["best-of-n", "gain low"])
    assert np.isnan(headline.loc["prompt-search", "gain low"])
    assert set(pd.read_csv(folder / "fig-02-curves.csv")["arm"]) == {"draft"}


def test_a_reward_that_is_no_number_diverges(place: Bench) -> None:
    """The cell has the base's pictures, so that its gain is zero; the run goes on, and does not try again."""
    changes = {**CHANGES, "methods": ["best-of-n"], "seeds": [0], "rewards": [place.reward("Printed")]}
    run = place.run("broken", **changes)
    (cell,), (base,) = cells(run, "best-of-n"), cells(run, "base")
    status = store.read_json(cell / "status.json")
    assert status["state"] == "diverged"
    assert "nan" in status["reason"]
    assert status["generation_cost"] == {}
    assert np.array_equal(latents(cell), latents(base))
    scores = [pd.read_parquet(path / "scores.parquet")["score"] for path in (cell, base)]
    assert scores[0].equals(scores[1])
    assert scores[0].notna().all()
    place.run("broken", **changes)
    assert place.ran == []


def test_generation_may_differentiate(place: Bench) -> None:
    """The evaluation asks for pictures without gradient; a method can switch it on, and its use is counted."""
    run = place.run("climb", methods=[f"{place.plugins}:Climber"], seeds=[0, 1])
    (cell,), (base,) = cells(run, "plugins"), cells(run, "base")
    status = store.read_json(cell / "status.json")
    assert status["state"] == "completed"
    spent = {"forward_rows": ROWS, "denoiser_rows": ROWS, "queries": 1, "decodes": 1, "reward_gradients": 1}
    assert {key: count for key, count in status["generation_cost"].items() if count} == spent
    expected = latents(base) - 0.1 * 2 * (latents(base) - 0.8) / 3
    np.testing.assert_allclose(latents(cell), expected, rtol=1e-5)


def test_the_plan_shows_what_a_picture_costs(place: Bench) -> None:
    """A dry run: cost of a picture and of the whole evaluation; the training budget neither limits nor counts."""
    passed = {**settings(place.plugins, place.folder / "planned", **CHANGES), "budget": {"amount": 2}}
    text = describe_cost(benchmark.plan(resolve(passed)))
    pictures = (2 + 3) * 2 + 2
    found = {line.split()[0]: line.split()[2:] for line in text.partition("No weights changed")[2].splitlines() if line}
    for arm, candidates in (("best-of-n", N), ("prompt-search", 8)):
        each = [candidates, candidates * ROWS]
        assert found[arm] == [str(n) for n in (*each, pictures, *(pictures * n for n in each))]
    assert "draft" not in found


def test_a_sampler_of_its_own_is_refused(place: Bench) -> None:
    """What trains nothing generates with the run's sampler."""
    passed = settings(place.plugins, place.folder / "own", methods=[], settings={})
    passed["arms"] = [{"label": "more", "method": "best-of-n", "overrides": {"sampler": {"steps": 9}}}]
    with pytest.raises(UserError, match="the run's sampler"):
        Grid(resolve(passed))


def test_lists_tell_the_kind() -> None:
    """From the source alone, also through the classes that a family shares."""
    kinds = {name: plugin.attributes["kind"] for name, plugin in discover("methods").items()}
    assert kinds.items() >= {"best-of-n": "inference", "prompt-search": "inference", "draft": "training"}.items()
    assert set(kinds.values()) == {"inference", "training"}
