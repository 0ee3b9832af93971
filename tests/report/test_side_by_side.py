"""Two runs in one report: compared where that means something, said where it does not."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from harness.cli import app
from harness.report.analysis import Analysis, analyse
from harness.report.records import load_run
from harness.report.side_by_side import build_side_by_side, caution, differing_settings, why_not_comparable
from tests.report.synthetic import Made, main_job, write_run
from tests.report.test_page import Page

REWARDS = (("emoji-3d", "proxy", "log-odds"), ("object-accuracy", "gold", "probability"))


def small(**changes: object) -> Made:
    """Two arms, one reward, four seeds, no pictures."""
    return main_job(**{"rewards": REWARDS, "seeds": 4, "images": False, **changes})


def made(folder: Path, name: str, changes: dict[str, object]) -> Path:
    """A run of that name."""
    run = write_run(folder / name, small(**changes))
    plan = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps({**plan, "name": name, "budget": {**plan["budget"], "amount": 256.0 if name == "two" else 256}})
    )
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same suite twice; the second run's methods are weaker, and it has one more."""
    folder = tmp_path_factory.mktemp("runs")
    weaker = {("draft", "emoji-3d"): 2.0, ("ddpo", "emoji-3d"): 0.4, ("refl", "emoji-3d"): 1.0}
    return made(folder, "one", {}), made(folder, "two", {"gains": weaker, "arms": ("draft", "ddpo", "refl")})


@pytest.fixture(scope="module")
def report(runs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both in one report."""
    return build_side_by_side(runs, tmp_path_factory.mktemp("out") / "both").parent


def test_differences_are_those_of_welch_on_seed_means(report: Path) -> None:
    """Estimate, interval and p are scipy's on the gains that each run's own report has in its files."""
    gains = [pd.read_csv(report / f"run-{i}" / "fig-01-forest.csv") for i in (1, 2)]
    found = pd.read_csv(report / "table-comparisons.csv").set_index("arm")
    assert list(found.index) == ["draft [two]", "ddpo [two]"]
    for arm in ("draft", "ddpo"):
        first, second = (g[(g["arm"] == arm) & (g["reward"] == "emoji-3d")]["gain_base_sd"].to_numpy() for g in gains)
        test = stats.ttest_ind(second, first, equal_var=False)
        interval = test.confidence_interval()
        row = found.loc[f"{arm} [two]"]
        assert row["reference"] == f"{arm} [one]"
        assert row["difference own base SD"] == pytest.approx(second.mean() - first.mean(), rel=1e-9)
        assert row["difference own base SD low"] == pytest.approx(interval.low, rel=1e-9)
        assert row["p"] == pytest.approx(test.pvalue, rel=1e-9)


def test_the_text_says_what_differs_and_what_was_left_out(report: Path) -> None:
    """The settings that differ stand before any verdict; a method without a counterpart is named."""
    text = (report / "report.md").read_text()
    head = text[: text.index("## Conclusions")]
    assert "| methods |" in head
    assert "budget.amount" not in head
    assert "draft \\[two\\] is worse than draft \\[one\\]" in text
    assert "refl of two: no method of that label in one" in text
    assert "not paired" in text
    assert all((report / f"run-{i}" / "report.md").is_file() for i in (1, 2))


def test_the_order_of_runs_decides_the_order_only(runs: tuple[Path, Path], report: Path, tmp_path: Path) -> None:
    """Swapped runs have the same gains; a report of a run alone has the same bytes as the one beside the others."""
    swapped = build_side_by_side(runs[::-1], tmp_path / "swapped").parent
    keys = ["training_reward", "run", "arm"]
    tables = [
        pd.read_csv(folder / "table-gains.csv").sort_values(keys, ignore_index=True) for folder in (report, swapped)
    ]
    pd.testing.assert_frame_equal(*tables)
    again = pd.read_csv(swapped / "table-comparisons.csv").set_index("arm")["difference own base SD"]
    there = pd.read_csv(report / "table-comparisons.csv").set_index("arm")["difference own base SD"]
    assert again["draft [one]"] == pytest.approx(-there["draft [two]"], rel=1e-12)
    assert (swapped / "run-1" / "report.md").read_bytes() == (report / "run-2" / "report.md").read_bytes()


def analysis_of(folder: Path, name: str, changes: dict[str, object]) -> Analysis:
    """What is known of a run."""
    return analyse(load_run(made(folder, name, changes)))


def test_other_prompts_latents_or_versions_are_not_compared(tmp_path: Path) -> None:
    """Each reason is found, and equal runs have none."""
    first = analysis_of(tmp_path, "first", {})
    prompts = small().prompts
    other_text = {**prompts, "held-out": (*prompts["held-out"][:-1], "another text")}
    assert why_not_comparable(first, analysis_of(tmp_path, "same", {"stream": 5}), "emoji-3d") == ""
    latents = analysis_of(tmp_path, "latents", {"latents": 3})
    assert "other prompts or latents" in why_not_comparable(first, latents, "emoji-3d")
    texts = analysis_of(tmp_path, "texts", {"prompts": other_text})
    assert "other prompts or latents" in why_not_comparable(first, texts, "emoji-3d")
    run = made(tmp_path, "version", {})
    plan = json.loads((run / "run.json").read_text())
    plan["rewards"][0]["version"] = "2"
    (run / "run.json").write_text(json.dumps(plan))
    assert "versions (1 and 2)" in why_not_comparable(first, analyse(load_run(run)), "emoji-3d")
    assert "not scored in both" in why_not_comparable(first, latents, "jpeg-compressibility")


def test_a_difference_that_settings_may_explain_is_not_left_to_the_methods(tmp_path: Path) -> None:
    """Budget and sampler are named before a verdict; names, seeds and what is empty are not."""
    runs = [made(tmp_path, name, {}) for name in ("one", "other")]
    changes = ({"early_stopping": None}, {"budget": {"amount": 128}, "sampler": {"steps": 7}, "variants": []})
    plans = [json.loads((run / "run.json").read_text()) for run in runs]
    for run, plan, change in zip(runs, plans, changes, strict=True):
        known = {key: {**plan.get(key, {}), **change[key]} for key in ("budget", "sampler") if key in change}
        config = {key: value for key, value in change.items() if key not in known}
        (run / "run.json").write_text(json.dumps({**plan, **known, "config": {**plan.get("config", {}), **config}}))
    found = differing_settings([analyse(load_run(run)) for run in runs], ["one", "other"])
    assert list(found.data["setting"]) == ["budget.amount", "sampler.steps"]
    assert "budget.amount (256, 128) and sampler.steps (" in caution(found)
    same = differing_settings([analyse(load_run(runs[0]))] * 2, ["one", "one (2)"])
    assert caution(same) == ""


def test_each_run_keeps_its_own_base_model(tmp_path: Path) -> None:
    """A run whose scores all are three times as large has the same gains in its own base SD."""
    run = made(tmp_path, "plain", {})
    large = made(tmp_path, "large", {})
    for path in (large / "cells").glob("*/scores.parquet"):
        table = pd.read_parquet(path)
        table.assign(score=3 * table["score"] + 7).to_parquet(path, index=False)
    gains = [analyse(load_run(folder)).final("draft", "emoji-3d") for folder in (run, large)]
    assert np.allclose(gains[1].values, 3 * gains[0].values)
    assert np.allclose(gains[1].standardised, gains[0].standardised)


def test_the_page_has_the_same_content_and_leads_to_the_pages_of_the_runs(report: Path) -> None:
    """Tables, figure and links of the text; every link leads to a file; there is nothing to explore."""
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    text = (report / "report.md").read_text(encoding="utf-8")
    words = " ".join(" ".join(page.words).split())
    assert "draft [two] is worse than draft [one]" in words
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert sum(map(len, page.tables)) == len(lines)
    assert [image["src"].partition(",")[0] for image in page.of("img")] == ["data:image/svg+xml;base64"]
    hrefs = [link["href"] for link in page.of("a") if not link["href"].startswith("#")]
    assert {"run-1/report.html", "run-2/report.html", "run-1/report.md", "run-2/report.md"} <= set(hrefs)
    assert all((report / href).is_file() for href in hrefs)
    assert not [tag for tag in page.of("script") if tag.get("id") == "explorer-data"]


def test_without_a_place_the_report_is_beside_the_first_run(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named for both, or for the first and how many more."""
    monkeypatch.setattr("harness.report.side_by_side.build_side_by_side", lambda runs, out: out / "report.md")
    for asked, name in ((runs, "one-vs-two"), ((*runs, runs[0]), "one-vs-2-others")):
        result = CliRunner().invoke(app, ["report", *map(str, asked)])
        folder = runs[0].parent / name
        assert result.output.splitlines() == [f"Report: {folder}/report.md", f"Page:   {folder}/report.html"]
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(tmp_path)])
    assert result.output.startswith(f"Report: {tmp_path}/report.md")
