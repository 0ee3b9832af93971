"""Figures of differences, of wins between seeds and of distributions: what they draw, recomputed from the records."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from scipy import optimize, stats

from harness.report import formatting as f
from harness.report.analysis import Analysis, analyse
from harness.report.captions import Drawn
from harness.report.differences import differences, probabilities, profile
from harness.report.records import load_run
from harness.report.style import GREY, PALE, drawing
from tests.report.synthetic import REWARDS, Made, write_run

ARMS = ("draft", "refl", "ddpo")
TRAINED = ("emoji-3d", "emoji-clip", "jpeg-compressibility")
SEEDS = 4
PAIRS = list(itertools.combinations(ARMS, 2))
FAMILY = len(PAIRS) * len(TRAINED)


def made(**changes: object) -> Made:
    """Three methods on three rewards; two of them are hard to tell apart."""
    gains = {
        (arm, reward): gain for arm, gain in (("draft", 0.30), ("refl", 0.28), ("ddpo", 0.0)) for reward in TRAINED
    }
    known = {"arms": ARMS, "training_rewards": TRAINED, "seeds": SEEDS, "gains": gains, "images": False}
    return Made(**{"rewards": REWARDS, "metrics": False, "seed_sd": 0.2, **known, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run."""
    return write_run(tmp_path_factory.mktemp("differences"), made())


@pytest.fixture(scope="module")
def analysis(run: Path) -> Analysis:
    """What the report knows of it."""
    return analyse(load_run(run))


@pytest.fixture(scope="module")
def gains(run: Path) -> dict[tuple[str, str], np.ndarray]:
    """(S,) final gains in base SD by method and training reward, from the parquet files alone."""
    keys = ["prompt_id", "noise_id"]
    tables = {path.parent.name: pd.read_parquet(path) for path in (run / "cells").glob("*/scores.parquet")}
    found = {}
    for arm, reward in itertools.product(ARMS, TRAINED):
        base = tables["base"][tables["base"]["reward"] == reward]
        groups = base.groupby("prompt_id")["score"]
        sd = np.sqrt((groups.var(ddof=1) * (groups.size() - 1)).sum() / (groups.size() - 1).sum())
        values = []
        for seed in range(SEEDS):
            rows = tables[f"{arm}--{reward}--seed{seed}"]
            mine = rows[(rows["reward"] == reward) & (rows["split"] == "held-out") & (rows["point"] == "final")]
            gain = mine.set_index(keys)["score"] - base.set_index(keys)["score"]
            values.append(gain.dropna().groupby("prompt_id").mean().mean() / sd)
        found[arm, reward] = np.asarray(values)
    return found


def draw(figure: object, analysis: Analysis) -> Drawn:
    """A figure that exists."""
    with drawing():
        drawn = figure(analysis, "fig")  # type: ignore[operator]
    assert isinstance(drawn, Drawn)
    return drawn


@pytest.fixture(scope="module")
def apart(analysis: Analysis) -> Drawn:
    """F2."""
    return draw(differences, analysis)


def detectable(first: np.ndarray, second: np.ndarray) -> float:
    """The difference that Welch's test at a family's first Holm step rejects with probability .8, by root finding."""
    variances = [values.var(ddof=1) / len(values) for values in (first, second)]
    error = np.sqrt(sum(variances))
    df = error**4 / sum(v**2 / (SEEDS - 1) for v in variances)
    critical = stats.t.isf(0.05 / FAMILY / 2, df)

    def lack(shift: float) -> float:
        return float(stats.nct.sf(critical, df, shift)) - 0.8  # the other tail has less than 1e-8

    return float(error * optimize.brentq(lack, 1e-3, 15.0))


def panels(drawn: Drawn) -> dict[str, Axes]:
    """Its axes by title."""
    return {axes.get_title(loc="left") or axes.get_title(): axes for axes in drawn.figure.axes if axes.axison}


@pytest.mark.parametrize("reward", TRAINED)
def test_differences_and_what_could_have_been_found(
    apart: Drawn, gains: dict[tuple[str, str], np.ndarray], reward: str
) -> None:
    """Welch's difference and interval, the Bonferroni one, and the detectable difference of every pair."""
    rows = apart.data[apart.data["training_reward"] == reward].set_index(["arm", "reference"])
    assert list(rows.index) == PAIRS
    for first, second in PAIRS:
        a, b = gains[first, reward], gains[second, reward]
        test = stats.ttest_ind(a, b, equal_var=False)
        row = rows.loc[(first, second)]
        assert row["difference"] == pytest.approx(a.mean() - b.mean(), rel=1e-9)
        narrow, wide = test.confidence_interval(), test.confidence_interval(1 - 0.05 / FAMILY)
        assert (row["low"], row["high"]) == pytest.approx((narrow.low, narrow.high), rel=1e-9)
        assert (row["simultaneous_low"], row["simultaneous_high"]) == pytest.approx((wide.low, wide.high), rel=1e-6)
        assert row["detectable"] == pytest.approx(detectable(a, b), rel=1e-5)
        assert (row["margin"], row["n"]) == (0.1, SEEDS)


def test_margin_and_detectable_difference_are_drawn_where_the_data_say(apart: Drawn) -> None:
    """A shaded band from -0.1 to 0.1 in every panel, and a grey whisker around 0 beside each pair."""
    for title, axes in panels(apart).items():
        rows = apart.data[apart.data["training_reward"] == title]
        assert len(rows) == (2 if title == "all training rewards" else 3)
        bands = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_facecolor() == to_rgba(PALE)]
        assert [(p.get_x(), p.get_x() + p.get_width()) for p in bands] == [pytest.approx((-0.1, 0.1))]
        whiskers = [line for line in axes.lines if line.get_color() == GREY and line.get_marker() == "|"]
        shown = [tuple(map(float, line.get_xdata())) for line in whiskers]
        assert shown == [pytest.approx((-value, value)) for value in rows["detectable"]]
        places = [float(line.get_ydata()[0]) for line in whiskers]
        assert places == pytest.approx(np.arange(len(rows)) + 0.3)
    assert "shaded: ±0.1 base SD" in apart.caption
    assert f"(n = {SEEDS})" in apart.caption


def test_the_words_of_the_differences_are_their_numbers(apart: Drawn) -> None:
    """Each pair stands in the alternative text with its difference and interval."""
    assert len(apart.data) == len(ARMS) - 1 + FAMILY
    for row in apart.data.itertuples():
        places = f.decimals((row.high - row.low) / 2)
        numbers = [f.fixed(float(x), places, sign=True) for x in (row.difference, row.low, row.high)]
        text = f"{row.arm} minus {row.reference} {numbers[0]} [{numbers[1]}, {numbers[2]}]"
        part = apart.alt.split(f"on {row.training_reward}: ")[1].split(";")[0]
        assert text in part


def test_wins_between_seeds_are_those_of_mann_whitney(
    analysis: Analysis, gains: dict[tuple[str, str], np.ndarray]
) -> None:
    """U over the number of pairs, in the data, in the grid on both sides of the diagonal, and averaged in the text."""
    drawn = draw(probabilities, analysis)
    rows = drawn.data.set_index(["training_reward", "arm", "reference"])
    assert len(rows) == FAMILY
    wins: dict[str, list[float]] = {arm: [] for arm in ARMS}
    shown = panels(drawn)
    assert list(shown) == list(TRAINED)
    for reward in TRAINED:
        expected = np.full((3, 3), np.nan)
        for (i, first), (j, second) in itertools.permutations(enumerate(ARMS), 2):
            u = stats.mannwhitneyu(gains[first, reward], gains[second, reward]).statistic
            expected[i, j] = u / SEEDS**2
            wins[first].append(expected[i, j])
            if i < j:
                row = rows.loc[(reward, first, second)]
                assert row["p_better"] == pytest.approx(expected[i, j], abs=1e-12)
                assert 0 <= row["low"] <= row["p_better"] <= row["high"] <= 1
                assert row["n"] == SEEDS
        grid = np.ma.filled(np.ma.asarray(shown[reward].images[0].get_array(), dtype=float), np.nan)
        np.testing.assert_allclose(grid, expected, atol=1e-12)
        texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in shown[reward].texts}
        assert texts == {k: f.fixed(float(v), 2) for k, v in np.ndenumerate(expected) if np.isfinite(v)}
        assert [label.get_text() for label in shown[reward].get_yticklabels()] == list(ARMS)
    for arm in ARMS:
        assert f"{arm} {f.fixed(float(np.mean(wins[arm])), 2)}" in drawn.alt
    assert "ties count half" in drawn.caption


def test_the_profile_is_the_share_of_runs_at_or_above_each_level(
    analysis: Analysis, gains: dict[tuple[str, str], np.ndarray]
) -> None:
    """One minus the distribution function of each reward's seeds, averaged over rewards; medians in the text."""
    drawn = draw(profile, analysis)
    every = np.unique(np.concatenate(list(gains.values())))
    axes = drawn.figure.axes[0]
    for arm in ARMS:
        mine = drawn.data[drawn.data["arm"] == arm]
        np.testing.assert_allclose(mine["gain_base_sd"], every, rtol=1e-9)
        below = [stats.ecdf(gains[arm, reward]).cdf.evaluate(every * (1 - 1e-9 * np.sign(every))) for reward in TRAINED]
        np.testing.assert_allclose(mine["share"], 1 - np.mean(below, axis=0), atol=1e-12)
        assert set(mine["n"]) == {SEEDS * len(TRAINED)}
        assert mine["share"].iloc[0] == 1
        line = next(line for line in axes.lines if line.get_label() == arm)
        # Between two levels as many runs have at least this gain as at the upper one.
        assert line.get_drawstyle() == "steps-pre"
        np.testing.assert_allclose(line.get_ydata(), mine["share"])
        median = np.median(np.concatenate([gains[arm, reward] for reward in TRAINED]))
        assert f"{arm} {f.fixed(float(median), 2)}" in drawn.alt
    assert "3 training rewards" in drawn.caption


def test_figures_that_would_say_nothing_are_left_out(tmp_path: Path) -> None:
    """Two methods have no grid of wins, fewer than three rewards no profile, one method no difference."""
    two = analyse(load_run(write_run(tmp_path / "two", made(arms=ARMS[:2], training_rewards=TRAINED[:2], seeds=2))))
    one = analyse(load_run(write_run(tmp_path / "one", made(arms=ARMS[:1], training_rewards=TRAINED[:1], seeds=2))))
    with drawing():
        assert differences(two, "fig") is not None
        assert probabilities(two, "fig") is None
        assert profile(two, "fig") is None
        assert differences(one, "fig") is None
