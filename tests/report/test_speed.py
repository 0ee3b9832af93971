"""How fast methods learn: every number of the table, recomputed the long way from the records."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.report import formatting as f
from harness.report.analysis import Analysis, analyse
from harness.report.records import load_run
from harness.report.speed import LEVEL, speed
from harness.report.tables import Table
from tests.report.synthetic import BUDGET, POINTS, Made, write_run

REWARD = "emoji-3d"
ARMS = ("refl", "draft", "ddpo")
GAINS = {("draft", REWARD): 0.4, ("refl", REWARD): 4.0, ("ddpo", REWARD): -0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fast method, one that reaches the level late or never, and one that loses."""
    made = Made(arms=ARMS, rewards=((REWARD, "proxy", "log-odds"),), gains=GAINS, latents=4, images=False, seed_sd=0.2)
    return write_run(tmp_path_factory.mktemp("speed"), made)


@pytest.fixture(scope="module")
def analysis(run: Path) -> Analysis:
    """What the report knows of it."""
    return analyse(load_run(run))


@pytest.fixture(scope="module")
def table(analysis: Analysis) -> Table:
    """The table under test."""
    return speed(analysis)


def scores(run: Path, cell: str, split: str | None = "held-out") -> pd.DataFrame:
    """A cell's records of one split."""
    rows = pd.read_parquet(run / "cells" / cell / "scores.parquet")
    return rows if split is None else rows[rows["split"] == split]


def sd(run: Path) -> float:
    """Pooled spread of the base model's pictures within a prompt."""
    groups = scores(run, "base", None).groupby("prompt_id")["score"]
    return float(np.sqrt((groups.var(ddof=1) * (groups.size() - 1)).sum() / (groups.size() - 1).sum()))


def heights(run: Path, arm: str, seed: int) -> list[float]:
    """The curve: mean gain at 32, 64, 128 and 256 queries on the first latent of each prompt, in base SD."""
    keys = ["prompt_id", "noise_id"]
    base = scores(run, "base").set_index(keys)["score"]
    rows = scores(run, f"{arm}--{REWARD}--seed{seed}")
    found = []
    for point in (*map(str, POINTS), "final"):
        mine = rows[(rows["point"] == point) & (rows["noise_id"] == 0)].set_index(keys)["score"]
        found.append(float((mine - base).dropna().mean()) / sd(run))
    return found


def final_gain(run: Path, arm: str) -> float:
    """Mean final gain over seeds on all latents, in the reward's unit."""
    keys = ["prompt_id", "noise_id"]
    base = scores(run, "base").set_index(keys)["score"]
    gains = []
    for seed in range(5):
        rows = scores(run, f"{arm}--{REWARD}--seed{seed}")
        gains.append((rows[rows["point"] == "final"].set_index(keys)["score"] - base).mean())
    return float(np.mean(gains))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of a mean."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)


def best_of(run: Path, gain: float) -> float:
    """Smallest n for which the best of n base pictures, over all subsets of the four latents, gains as much."""
    prompts = [list(map(float, rows)) for _, rows in scores(run, "base").groupby("prompt_id")["score"]]
    mean = np.mean(prompts)
    for n in range(1, 5):
        if np.mean([np.mean([max(s) for s in itertools.combinations(p, n)]) for p in prompts]) - mean >= gain:
            return n
    return float("inf")


def rows_of(table: Table) -> Mapping[str, Sequence[str]]:
    """Cells of the shown table by method."""
    return {row[0].strip("*").split(" ")[0]: row for row in table.rows}


@pytest.mark.parametrize("arm", ARMS)
def test_height_is_the_trapezoid_over_the_logarithm_of_queries(run: Path, table: Table, arm: str) -> None:
    """Mean and interval over seeds, in the data and as shown."""
    grid = np.log([*POINTS, BUDGET])
    areas = [float(np.trapezoid(heights(run, arm, seed), grid) / np.log(BUDGET / POINTS[0])) for seed in range(5)]
    row = table.data.set_index("arm").loc[arm]
    assert row["height"] == pytest.approx(np.mean(areas), rel=1e-9)
    assert (row["height low"], row["height high"]) == pytest.approx(interval(areas), rel=1e-9)
    places = f.decimals((row["height high"] - row["height low"]) / 2)
    assert rows_of(table)[arm][2].startswith(f.fixed(float(np.mean(areas)), places, sign=True))
    assert rows_of(table)[arm][3].startswith(f.fixed(final_gain(run, arm) / sd(run), 1, sign=True)[:3])


def test_queries_until_the_level_count_seeds_that_never_reach_it_with_the_budget(run: Path, table: Table) -> None:
    """The first point at or above the level; k of n is said; all, some and none of the seeds reach it."""
    seen = {}
    for arm in ARMS:
        curves = [heights(run, arm, seed) for seed in range(5)]
        hits = [[q for q, y in zip((*POINTS, BUDGET), curve, strict=True) if y >= LEVEL] for curve in curves]
        times = [float(hit[0]) if hit else float(BUDGET) for hit in hits]
        row = table.data.set_index("arm").loc[arm]
        seen[arm] = sum(map(bool, hits))
        assert (row["reached"], row["n"]) == (seen[arm], 5)
        assert rows_of(table)[arm][5] == f"{seen[arm]} of 5 seeds"
        assert row["queries until"] == pytest.approx(np.mean(times), rel=1e-12)
        if len(set(times)) > 1:
            assert (row["queries until low"], row["queries until high"]) == pytest.approx(interval(times), rel=1e-9)
    assert seen["refl"] == 5
    assert 0 < seen["draft"] <= 5
    assert seen["ddpo"] == 0
    assert table.data.set_index("arm").loc["ddpo", "queries until"] == BUDGET


def test_like_the_best_of_n_is_that_of_all_subsets_of_latents(run: Path, table: Table) -> None:
    """A small gain has its n; beyond all latents it says so; a loss is what the first picture gives."""
    data = table.data.set_index("arm")
    assert data.loc["draft", "best_of_n"] == best_of(run, final_gain(run, "draft"))
    assert 1 < data.loc["draft", "best_of_n"] <= 4
    assert rows_of(table)["draft"][6] == str(int(data.loc["draft", "best_of_n"]))
    assert np.isinf(data.loc["refl", "best_of_n"])
    assert rows_of(table)["refl"][6] == "more than 4"
    assert rows_of(table)["ddpo"][6] == "1"


def test_a_run_without_points_along_training_has_no_such_table(run: Path, tmp_path: Path) -> None:
    """One point is no curve: no row, and no name under which an empty table would be shown."""
    copied = write_run(tmp_path, Made(arms=ARMS[:2], rewards=((REWARD, "proxy", "log-odds"),), seeds=2, images=False))
    for path in (copied / "cells").glob("*/scores.parquet"):
        rows = pd.read_parquet(path)
        rows[rows["point"] == "final"].to_parquet(path, index=False)
    found = speed(analyse(load_run(copied)))
    assert found.name == ""
    assert found.rows == ()
