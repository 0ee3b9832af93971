"""The script that times methods at Stable Diffusion's size, at a size that runs here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import real_sizes
from harness.registry import load_method

pytest.importorskip("open_clip", reason="needs draft-bench[rewards]")


def test_one_method(tmp_path: Path) -> None:
    """An update of a method is timed and counted, with random weights in the real layouts."""
    pipeline, reward = tmp_path / "pipeline", tmp_path / "reward"
    real_sizes.build_pipeline(pipeline, "tiny")
    real_sizes.build_reward(reward, "tiny")
    plain, recomputed = (
        real_sizes.measure(
            real_sizes.run_settings("draft", checkpointing, "tiny", "cpu", "float32", pipeline, reward), "tiny"
        )
        for checkpointing in real_sizes.CONDITIONS
    )
    assert (plain["pictures"], plain["updates"]) == (4, 1)
    assert 0 < plain["utilisation"] < 1
    assert sum(plain["shares"].values()) == pytest.approx(100, abs=1)
    # Recomputing each of the chain's steps adds a forward pass to a forward and a backward pass.
    operations = [row["teraflops"] * row["seconds_per_iteration"] for row in (plain, recomputed)]
    assert operations[1] > 1.1 * operations[0]
    text = real_sizes.table([{"method": "draft", "checkpointing": "off", **plain}])
    assert text.count("\n") == 2


@pytest.mark.parametrize(("method", "pictures"), [("draft", 4), ("ddpo", 8), ("ddpo-sf", 4), ("d3po", 16), ("grpo", 8)])
def test_every_update_sees_four_pictures(method: str, pictures: int) -> None:
    """Rollouts are as many batches as a method makes updates of them (D3PO's are of pairs)."""
    settings = real_sizes.batches(method)
    load_method(method).Config.model_validate(settings)
    assert max(settings.get("rollout_size", 0), settings.get("batch_size", 0)) == pictures


def test_a_method_that_fails_is_a_row(tmp_path: Path) -> None:
    """What does not fit into memory says so, and the others go on."""
    rows = [{"method": "draft", "checkpointing": "off", "failed": "out of memory"}]
    assert "out of memory" in real_sizes.table(rows)
