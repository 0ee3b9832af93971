"""Claims and statements: contrasts are the textbook's, verdicts say when they hold jointly, what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.finding import Finding, Statement
from harness.report.analysis import Analysis, analyse
from harness.report.build import build_report
from harness.report.findings import (
    CONFIRMED,
    MISSING,
    NOT_CONFIRMED,
    UNDECIDED,
    contrast,
    judge_finding,
    quantity_values,
)
from harness.report.records import load_run
from tests.report.synthetic import main_job, write_run


@pytest.fixture(scope="module")
def analysis(main_run: Path) -> Analysis:
    """Draft gains 3.4 and ddpo 0.4 on emoji-3d, with noise by seed."""
    return analyse(load_run(main_run))


def statement(**content: Any) -> Statement:
    """A statement of some words."""
    return Statement.model_validate({"text": "words", **content})


def gains(analysis: Analysis, arm: str, reward: str = "emoji-3d", **where: Any) -> np.ndarray:
    """(S,) standardised gains, straight from the gains' table."""
    return analysis.gains.final(arm, "emoji-3d", reward, **where).standardised


def test_contrasts_are_welch_paired_and_one_sample_intervals(analysis: Analysis) -> None:
    """Of two trainings: Welch, or paired where declared; of one training: the seeds' own combination."""
    a, b = gains(analysis, "draft"), gains(analysis, "ddpo")
    both = statement(plus=[{"arm": "draft"}], minus=[{"arm": "ddpo"}])
    for paired, test in ((False, stats.ttest_ind(a, b, equal_var=False)), (True, stats.ttest_rel(a, b))):
        found, expected = contrast(analysis, both, paired, 0.95), test.confidence_interval(0.95)
        assert found.estimate == pytest.approx(a.mean() - b.mean())
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    training = gains(analysis, "draft", split="training")
    one = statement(plus=[{"arm": "draft"}], minus=[{"arm": "draft", "split": "training", "times": 0.8}])
    expected = stats.ttest_1samp(a - 0.8 * training, 0).confidence_interval(0.99)
    found = contrast(analysis, one, False, 0.99)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_verdicts_say_whether_they_hold_jointly(analysis: Analysis) -> None:
    """True, false, open and absent statements, each with its word; more statements make the joint interval wider."""
    draft, ddpo = {"arm": "draft"}, {"arm": "ddpo"}
    contents = [
        {"plus": [draft], "minus": [ddpo]},
        {"plus": [ddpo], "minus": [draft]},
        {"plus": [{**ddpo, "reward": "emoji-clip"}]},
        {"plus": [{"arm": "nobody"}]},
        {"plus": [draft], "beyond": 1e6},
    ]
    finding = Finding(title="t", claim="c", source="s", statements=tuple(statement(**one) for one in contents))
    judged = judge_finding(analysis, finding)
    assert [item.verdict for item in judged] == [CONFIRMED, NOT_CONFIRMED, UNDECIDED, MISSING, NOT_CONFIRMED]
    assert [item.jointly for item in judged] == [True, True, False, False, True]
    assert judged[0].joint.level == pytest.approx(1 - 0.05 / 5)
    assert judged[0].joint.half_width > judged[0].interval.half_width
    # A statement may hold alone and not jointly.
    edge = (judged[0].joint.low + judged[0].interval.low) / 2
    between = finding.model_copy(
        update={"statements": (statement(**contents[0], beyond=edge), *finding.statements[1:])}
    )
    edged = judge_finding(analysis, between)[0]
    assert (edged.verdict, edged.jointly) == (CONFIRMED, False)


def test_gains_on_an_axis_are_read_where_all_have_spent_as_much(analysis: Analysis) -> None:
    """Between the points of each seed's curve, at the end of the arm that spends least."""
    curves = {arm: analysis.gains.curve(arm, "emoji-3d", "emoji-3d") for arm in ("draft", "ddpo")}
    ends = {arm: curve.spent["denoiser_rows"][:, -1] for arm, curve in curves.items()}
    amount = min(ends["draft"].min(), ends["ddpo"].min())
    assert ends["draft"].max() < ends["ddpo"].min()
    found = contrast(
        analysis,
        statement(plus=[{"arm": "draft", "axis": "denoiser_rows"}], minus=[{"arm": "ddpo", "axis": "denoiser_rows"}]),
        False,
        0.95,
    )
    curve, sd = curves["ddpo"], analysis.gains.sd("emoji-3d")
    read = [np.interp(amount, x, y) / sd for x, y in zip(curve.spent["denoiser_rows"], curve.values, strict=True)]
    whole = curves["draft"].values[:, -1] / sd
    assert found.estimate == pytest.approx(whole.mean() - np.mean(read))


def test_quantities_beyond_gains(analysis: Analysis) -> None:
    """Diversity over the base's, seconds of updates, points of the curve."""
    ratio = statement(plus=[{"arm": "draft", "of": "diversity"}]).plus[0]
    vendi = analysis.gains.metric("draft", "emoji-3d", "vendi") / analysis.gains.base_metric("vendi")
    assert list(quantity_values(analysis, ratio).values()) == pytest.approx(list(vendi))
    seconds = statement(plus=[{"arm": "draft", "of": "update-seconds"}]).plus[0]
    assert list(quantity_values(analysis, seconds).values()) == pytest.approx([np.log(0.4)] * 5)
    early = statement(plus=[{"arm": "draft", "point": "64"}]).plus[0]
    expected = gains(analysis, "draft", point="64")
    assert list(quantity_values(analysis, early).values()) == pytest.approx(list(expected))
    assert expected.mean() < gains(analysis, "draft").mean()


def test_the_report_has_a_section_for_every_claim(tmp_path: Path) -> None:
    """Claim, source, what was found and a table with its CSV; texts stay texts."""
    run = write_run(tmp_path / "run", main_job())
    plan = json.loads((run / "run.json").read_text())
    plan["config"]["findings"] = [
        {
            "title": "<b>Bold</b> claim",
            "claim": "DRaFT | wins",
            "source": "someone",
            "statements": [{"text": "more [than](x)", "plus": [{"arm": "draft"}], "minus": [{"arm": "ddpo"}]}],
        }
    ]
    (run / "run.json").write_text(json.dumps(plan))
    report = build_report(run)
    text = report.read_text(encoding="utf-8")
    assert "## Claim: &lt;b&gt;Bold" in text
    assert "DRaFT \\| wins" in text
    assert "Of 1 statement: 1 confirmed (1 also jointly)." in text
    table = pd.read_csv(report.with_name("table-finding-1.csv"))
    assert list(table["verdict"]) == ["confirmed"]
    assert table["joint_low"][0] == table["low"][0] > 0
