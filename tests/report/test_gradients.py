"""Gradient probes in the report: what was planted in made-up rows comes out of figure, tables and numbers per seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from harness.errors import UserError
from harness.report.gradient_tables import norms_table, variance_table
from harness.report.gradients import log_growth, log_norm, log_relative_variance, norms_figure
from harness.report.gradients import norm_rows as figure_rows
from harness.report.style import drawing, write_figure
from harness.store import PROBE_COLUMNS

ARMS = ("draft", "draft-k", "draft-lv", "refl", "alignprop")
SLOPE = {"start": 0.05, "middle": 0.12, "end": 0.3}
T, SEEDS, REWARD = 20, 3, "emoji-3d"
VARIANCES = {
    "draft": (4.0, 2.0, 60.0, 4.0),
    "draft-lv": (1.0, 0.5, 120.0, 12.0),
}  # variance, squared mean, rows, queries


def row(**given: Any) -> dict[str, Any]:
    """A row of `probes.parquet`."""
    empty = {
        "method": "m",
        "training_reward": REWARD,
        "guidance": 2.0,
        "estimator": "",
        "prompt_id": "",
        "noise_id": -1,
    }
    return {**empty, "cell": f"{given['arm']}--{given['seed']}", "step": -1, "t": -1, **given}


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """With the columns and types of the records."""
    return pd.DataFrame({name: pd.Series([r[name] for r in rows], dtype=kind) for name, kind in PROBE_COLUMNS.items()})


def norm_rows(arms: tuple[str, ...] = ARMS, points: tuple[str, ...] = tuple(SLOPE), pictures: int = 9) -> pd.DataFrame:
    """Norms that grow by exp(slope) per step, slopes of 0.02 more for each arm, half of it without guidance.

    The middle picture of each (seed, step) is the median exactly, the others lie around it.
    """
    rows = []
    for point in points:
        for i, arm in enumerate(arms):
            for seed in range(SEEDS):
                for guidance, share in ((2.0, 1.0), (1.0, 0.5)):
                    slope = share * (SLOPE[point] + (0.02 * i if point != "start" else 0.0))
                    for step, picture in np.ndindex(T, pictures):
                        spread = (picture - pictures // 2) * 0.3
                        norm = math.exp(0.2 * (seed - 1) + slope * (T - 1 - step) + spread)
                        place = {"probe": "gradient-norms", "point": point, "arm": arm, "seed": seed, "step": step}
                        place |= {
                            "guidance": guidance,
                            "t": 999 - 50 * step,
                            "prompt_id": f"p{picture}",
                            "noise_id": picture,
                        }
                        for quantity, factor in (
                            ("norm-latents", 2.0),
                            ("norm-adapter", 0.1),
                            ("norm-adapter-total", 1.0),
                        ):
                            rows.append(row(**place, quantity=quantity, value=factor * norm))
    return frame(rows)


def variance_rows(points: tuple[str, ...] = ("start", "end")) -> pd.DataFrame:
    """Two estimators at the weights of two arms; every seed has its own scale, ratios are the same in all."""
    rows = []
    for point in points:
        for arm in VARIANCES:
            for seed in range(SEEDS):
                for estimator, (variance, squared, denoiser_rows, queries) in VARIANCES.items():
                    luck = 1.0 + seed + (0.5 if point == "end" and arm == "draft-lv" else 0.0)
                    values = {"variance": variance * luck**2, "squared-mean": squared * luck, "requests": 4.0}
                    values |= {"rows": denoiser_rows, "queries": queries}
                    values["cosine"] = 1.0 if estimator == "draft" else 0.8 + 0.05 * (seed - 1)
                    place = {
                        "probe": "gradient-variance",
                        "point": point,
                        "arm": arm,
                        "seed": seed,
                        "estimator": estimator,
                    }
                    rows += [row(**place, quantity=quantity, value=value) for quantity, value in values.items()]
    return frame(rows)


def test_planted_slopes_come_out_of_table_and_seeds() -> None:
    """Growth per step is the factor put in, at every point, with and without guidance; norms are the medians."""
    probes = norm_rows(arms=ARMS[:2])
    table = norms_table(probes, ARMS[:2], REWARD, "table-norms")
    data = table.data.set_index(["weights", "point", "guidance"])
    for arm, more in (("draft", 0.0), ("draft-k", 0.02)):
        for guidance, share in ((2.0, 1.0), (1.0, 0.5)):
            line = data.loc[(arm, "end", guidance)]
            assert line["growth"] == pytest.approx(math.exp(share * (0.3 + more)), rel=1e-9)
            assert line["K=5"] == pytest.approx(math.exp(share * (0.3 + more) * 4), rel=1e-9)
            assert line["K=T p95"] / line["K=T"] == pytest.approx(math.exp(1.2 - 0.4 * 0.3 * 1), rel=0.05)
            assert line["K=5 low"] < line["K=5"] < line["K=5 high"]
            where: dict[str, Any] = {"training_reward": REWARD, "point": "end", "guidance": guidance}
            slopes = log_growth(probes, arm, **where)
            assert slopes == pytest.approx(dict.fromkeys(range(SEEDS), share * (0.3 + more)))
            norms = log_norm(probes, arm, **where, norm="adapter")
            assert norms == pytest.approx({s: 0.2 * (s - 1) + share * (0.3 + more) * (T - 1) for s in range(SEEDS)})
            by_latents = log_norm(probes, arm, **where, norm="latents", step=T - 1)
            assert by_latents == pytest.approx({seed: 0.2 * (seed - 1) + math.log(2) for seed in range(SEEDS)})
    assert table.headers == (
        *("weights", "K = 1", "K = 2", "K = 5", "K = 10", "K = T = 20"),
        *("growth per step, guidance 2", "growth per step, without guidance"),
    )
    assert [line[0] for line in table.rows] == [
        "all arms, start", "**draft**, middle", "**draft-k**, middle", "**draft**, end", "**draft-k**, end",
    ]  # fmt: skip
    assert "All gradients were finite." in table.note
    with pytest.raises(UserError, match="needs a step"):
        log_norm(probes, "draft", training_reward=REWARD, point="end", guidance=2.0, norm="latents")


def test_the_interval_of_a_growth_is_that_of_its_seeds() -> None:
    """Slopes of 0.1, 0.2 and 0.3: their mean, and Student's t on two degrees of freedom by hand."""
    probes = norm_rows(arms=("draft",), points=("end",))
    tilt = np.exp((probes["seed"] - 2) * 0.1 * (T - 1 - probes["step"]))
    probes["value"] *= tilt.where(probes["guidance"] == 2.0, 1.0)
    line = norms_table(probes, ("draft",), REWARD, "t").data.iloc[0]
    reach = 4.302653 * 0.1 / 3**0.5
    assert math.log(line["growth"]) == pytest.approx(0.2)
    assert math.log(line["growth low"]) == pytest.approx(0.2 - reach, rel=1e-5)
    assert math.log(line["growth high"]) == pytest.approx(0.2 + reach, rel=1e-5)


def test_norms_that_are_no_numbers_are_counted_and_said() -> None:
    """They leave the median, a seed without any finite one has none, and the share stands in note and data."""
    probes = norm_rows(arms=("draft",), points=("end",))
    lost = (probes["noise_id"] == 0) & (probes["guidance"] == 2.0)
    gone = (probes["seed"] == 2) & (probes["guidance"] == 1.0)
    probes.loc[lost, "value"] = float("inf")
    probes.loc[gone, "value"] = float("nan")
    table = norms_table(probes, ("draft",), REWARD, "t")
    assert "11 % of draft at the end, guidance 2 and 33 % of draft at the end, without guidance" in table.note
    assert list(table.data["not finite"]) == pytest.approx([1 / 9, 1 / 3])
    found = log_norm(probes, "draft", training_reward=REWARD, point="end", guidance=1.0, norm="adapter", step=0)
    assert math.isnan(found[2])
    assert math.isfinite(found[1])
    assert table.data.iloc[1]["growth n"] == 2
    assert table.data.iloc[0]["K=1"] == pytest.approx((1 + math.exp(0.3)) / 2)  # the median of the eight that are left


def test_planted_variance_ratios_come_out() -> None:
    """Half the variance over the squared mean is planted as equal; costs make the ratios 1, 2 and 3."""
    probes = variance_rows()
    table = variance_table(probes, ("ddpo", *VARIANCES), REWARD, "table-variance")
    data = table.data.set_index(["weights", "point", "estimator"])
    line = data.loc[("draft-lv", "end", "draft-lv")]
    assert line["ratio at equal batch"] == pytest.approx(1.0)
    assert line["ratio at equal denoiser rows"] == pytest.approx(2.0)
    assert line["ratio at equal queries"] == pytest.approx(3.0)
    assert line["relative variance"] == pytest.approx(2 * (1.5 * 2.5 * 3.5) ** (1 / 3))
    assert line["cosine"] == pytest.approx(0.8)
    assert line["cosine high"] - 0.8 == pytest.approx(4.302653 * 0.05 / 3**0.5, rel=1e-5)
    found = log_relative_variance(probes, "draft", at_arm="draft-lv", training_reward=REWARD, point="end")
    assert found == pytest.approx({seed: math.log(2.0 * (1.5 + seed) * 60) for seed in range(SEEDS)})
    assert len(table.headers) == 7
    assert [line[0] for line in table.rows[::2]] == ["all arms, start", "**draft**, end", "**draft-lv**, end"]
    assert table.rows[0][3:] == ("1", "1", "1", "1")
    assert table.rows[1][4].startswith("2.00")


def test_a_squared_mean_that_is_lost_in_noise_is_said() -> None:
    """Its seed has no ratio; how many of the seeds are left stands in the cell."""
    probes = variance_rows(("end",))
    lost = (probes["seed"] == 1) & (probes["estimator"] == "draft-lv") & (probes["quantity"] == "squared-mean")
    probes.loc[lost, "value"] = -0.1
    table = variance_table(probes, tuple(VARIANCES), REWARD, "t")
    found = log_relative_variance(probes, "draft-lv", at_arm="draft", training_reward=REWARD, point="end")
    assert [math.isnan(found[seed]) for seed in range(SEEDS)] == [False, True, False]
    assert table.rows[1][4].endswith("(2/3)")
    assert "k/n" in table.note


def test_the_figure_shows_medians_and_says_what_coincides(tmp_path: Path) -> None:
    """Its data are geometric means over seeds of medians; files are written, the caption is made from the rows."""
    probes = norm_rows(arms=("draft", "refl"), points=("start", "end"), pictures=3)
    with drawing():
        drawn = norms_figure(probes.sample(frac=1, random_state=0), ARMS, REWARD, "fig-norms")
        assert drawn is not None
        write_figure(drawn.figure, tmp_path / drawn.name, vector=False)
    assert (tmp_path / "fig-norms.png").stat().st_size > 10_000
    again = figure_rows(probes, ARMS)
    pd.testing.assert_frame_equal(drawn.data.reset_index(drop=True), again.reset_index(drop=True))
    first = drawn.data.iloc[0]
    assert (first["arm"], first["point"], first["quantity"]) == ("draft", "start", "norm-adapter")
    mine = drawn.data[(drawn.data["arm"] == "refl") & (drawn.data["point"] == "end") & (drawn.data["guidance"] == 2.0)]
    line = mine[(mine["quantity"] == "norm-latents") & (mine["step"] == 0)]
    assert list(line["mean"]) == pytest.approx([2 * math.exp(0.32 * (T - 1))] * SEEDS)
    assert len(drawn.figure.axes) == 2 * 2 * 2
    assert "At the start all arms have the same weights" in drawn.caption
    assert "3 pictures" in drawn.caption
    assert "3 training seeds" in drawn.caption
    assert "draft guidance 2: 2.00 at the last step, 598 at the first" in drawn.alt


def test_missing_points_arms_and_seeds_do_not_crash() -> None:
    """What is there is shown; nothing at all gives no figure and empty tables."""
    probes = norm_rows(arms=ARMS[:2])
    probes = probes[~((probes["arm"] == "draft-k") & (probes["point"] == "end")) & (probes["point"] != "middle")]
    probes = probes[(probes["seed"] == 0) & (probes["guidance"] == 2.0)]
    with drawing():
        drawn = norms_figure(probes, ARMS, REWARD, "fig")
        assert drawn is not None
        drawn.figure.draw_without_rendering()
        empty = frame([])
        assert norms_figure(empty, ARMS, REWARD, "fig") is None
        assert norms_figure(probes, ARMS, "another", "fig") is None
    table = norms_table(probes, ARMS, REWARD, "t")
    assert [line[0] for line in table.rows] == ["all arms, start", "**draft**, end"]
    assert len(table.headers) == len(table.rows[0]) == 7
    assert "(n=1)" in table.rows[1][-1]
    for nothing in (empty, probes, norm_rows(arms=("draft",))):
        found = variance_table(nothing, ARMS, REWARD, "t")
        assert found.name == ""
        assert "Nothing to show" in found.markdown
    assert norms_table(empty, ARMS, REWARD, "t").rows == ()
    where: dict[str, Any] = {"training_reward": REWARD, "point": "end"}
    assert log_norm(empty, "draft", **where, guidance=2.0, norm="adapter") == {}
    assert log_growth(empty, "draft", **where, guidance=2.0) == {}
    assert log_relative_variance(empty, "draft", at_arm="draft", **where) == {}
    assert log_relative_variance(probes, "draft", at_arm="draft", **where) == {}
