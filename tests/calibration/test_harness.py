"""The whole way from a run to its verdict: equal arms are not separated, and a planted gain is found where it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import stats

from harness.stats.verdict import Verdict
from tests.calibration.planted import MEAN, SD
from tests.calibration.rates import assert_exact, coverage
from tests.calibration.replicas import analyse_seeds, run_arm

PLANTED = Path(__file__).with_name("planted.py")
REPLICAS, SEEDS = 20, 5


def test_one_method_under_two_names(tmp_path: Path) -> None:
    """With seeds of their own, two arms of one method are told apart as often as chance says, not more."""
    whole, reward = tmp_path / "run", f"{PLANTED}:Brightness"
    blocks = {"a": range(REPLICAS * SEEDS), "b": range(1000, 1000 + REPLICAS * SEEDS)}
    for label, seeds in blocks.items():
        run_arm(whole, {"label": label, "method": "draft"}, reward, seeds, {"amount": 16})
    judgements = []
    for i in range(REPLICAS):
        mine = {label: seeds[i * SEEDS : (i + 1) * SEEDS] for label, seeds in blocks.items()}
        analysis = analyse_seeds(whole, tmp_path / f"replica{i}", mine)
        judgements.append((analysis.primary[0], analysis.secondary[analysis.run.training_rewards[0]][0]))
    for which in (0, 1):  # the permutation test of the primary family, Welch's of the secondary one
        found = [pair[which] for pair in judgements]
        p = [judgement.comparison.p for judgement in found]
        assert len(set(p)) > REPLICAS / 2
        assert sum(x < 0.05 for x in p) <= 3
        assert sum(judgement.verdict in (Verdict.BETTER, Verdict.WORSE) for judgement in found) <= 3
        assert stats.kstest(p, "uniform").pvalue > 0.001


def test_a_planted_gain(tmp_path: Path) -> None:
    """The intervals of five seeds contain the gain that was put in, in 95 of 100 cases."""
    replicas = 2 * REPLICAS
    arm = {"label": "planted", "method": f"{PLANTED}:Planted"}
    whole = run_arm(
        tmp_path / "run", arm, f"{PLANTED}:Brightness", range(replicas * SEEDS), {"unit": "iterations", "amount": 1}
    )
    truth = planted_gain(whole)
    gains = []
    for i in range(replicas):
        analysis = analyse_seeds(whole, tmp_path / f"replica{i}", {"planted": range(i * SEEDS, (i + 1) * SEEDS)})
        gains.append(analysis.final("planted", analysis.run.training_rewards[0]))
    assert_exact(coverage([gain.interval for gain in gains], truth), 0.95)
    for wrong in (0.0, 2 * truth):
        with pytest.raises(AssertionError, match="is not"):
            assert_exact(coverage([gain.interval for gain in gains], wrong), 0.95)
    every = np.concatenate([gain.values for gain in gains])
    assert abs(every.mean() - truth) < 3 * every.std() / len(every) ** 0.5


def planted_gain(run: Path) -> float:
    """The expected gain on the run's latents: the mean over seeds' shifts of their 8-bit pictures.

    A shift of the predicted noise moves all latents by the same multiple of it, which is read off the latents and the
    adapter that one cell stored; the rest is an integral over the normal distribution that shifts are drawn from.
    """
    cell, base = next((run / "cells").glob("planted*")), latents(run / "cells" / "base")
    moved = latents(cell) - base
    step = -load_file(cell / "adapter" / "adapter.safetensors")["bias"].astype(np.float64)
    slope = float((moved / step).mean())
    np.testing.assert_allclose(moved, np.broadcast_to(slope * step, moved.shape), rtol=1e-3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    pictures = [eight_bit(base + slope * (MEAN + SD * node)).mean() for node in nodes]
    return float(np.average(pictures, weights=weights) - eight_bit(base).mean())


def latents(cell: Path) -> np.ndarray:
    """The latents of a cell's pictures."""
    return np.load(cell / "latents.npz")["latents"].astype(np.float64)


def eight_bit(pictures: np.ndarray) -> np.ndarray:
    """Pictures as files keep them."""
    return np.round(255 * pictures.clip(0, 1)) / 255
