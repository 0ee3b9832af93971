"""How the denoiser computes is a setting of the run: recomputing changes what is spent, compiling what cells are."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import store
from harness.config import DenoiserConfig, parse_set, resolve
from harness.errors import UserError
from harness.grid import Grid
from models.gaussian import GaussianModel
from tests.engine.fakes import PLUGINS, Bench, outcome, scores, updates


def test_a_run_that_recomputes_blocks(bench: Bench, pipeline_directory: Path) -> None:
    """The same scores and the same trained adapter; each row of a backward pass is counted once more."""
    shared = {"model": str(pipeline_directory), "methods": ["draft"]}
    kept = bench.run("kept", **shared)
    again = bench.run("again", **shared, **parse_set(["denoiser.checkpoint_inside=true"]))
    (cell,) = (path.name for path in (kept / "cells").iterdir() if path.name != "base")
    first, second = kept / "cells" / cell, again / "cells" / cell

    assert outcome(first)["training_hash"] == outcome(second)["training_hash"]
    assert store.read_json(again / "run.json")["config"]["denoiser"]["checkpoint_inside"] is True
    assert [path.read_bytes() for path in sorted(first.rglob("*.safetensors"))] == [
        path.read_bytes() for path in sorted(second.rglob("*.safetensors"))
    ]
    scores_of = [
        scores(path).set_index(["point", "reward", "prompt_id", "noise_id"])["score"] for path in (first, second)
    ]
    assert scores_of[0].equals(scores_of[1])
    for before, after in zip(updates(first), updates(second), strict=True):
        assert after["backward_rows"] == before["backward_rows"] > 0
        assert after["recomputed_rows"] == before["recomputed_rows"] + before["backward_rows"]


def test_compiled_cells_are_other_cells() -> None:
    """Compiled code rounds differently, so nothing is reused; recomputing gives the same numbers, so all is."""
    passed = {"preset": "smoke", "model": "gaussian", "methods": ["draft"], "rewards": [f"{PLUGINS}:Quadratic"]}
    default, inside, compiled = (
        Grid(resolve({**passed, "denoiser": chosen}), GaussianModel())
        for chosen in ({}, {"checkpoint_inside": True}, {"compile": True})
    )

    assert inside.cells == default.cells
    assert inside.run_directory() == default.run_directory() != compiled.run_directory()
    for cell, other in zip(default.cells, compiled.cells, strict=True):
        assert cell.evaluation_hash != other.evaluation_hash
        assert (cell.training_hash != other.training_hash) == (cell.arm != "base")


def test_settings_that_cannot_be(bench: Bench) -> None:
    """Both at once, and a model without a network."""
    with pytest.raises(UserError, match="do not go together"):
        resolve({"preset": "smoke", **parse_set(["denoiser.compile=true", "denoiser.checkpoint_inside=true"])})
    with pytest.raises(UserError, match="gaussian is a formula"):
        bench.run(denoiser=DenoiserConfig(compile=True).model_dump())
