"""Reports of made-up runs: they tell the truth that was put in, for every kind of run."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from harness.errors import UserError
from harness.report.analysis import analyse
from harness.report.build import build_report
from harness.report.heatmap import heatmap
from harness.report.records import load_run
from harness.report.style import drawing
from tests.report.synthetic import Made, grid_job, main_job, write_run

DRAFT = {"arm": "draft", "reward": "emoji-3d"}


def read(folder: Path, name: str) -> pd.DataFrame:
    """A CSV of the report."""
    return pd.read_csv(folder / f"{name}.csv")


def links(text: str) -> set[str]:
    """Files that a report points to."""
    return set(re.findall(r'src="([^"]+)"', text)) | set(re.findall(r"\]\(([^)#]+)\)", text))


def test_every_link_of_the_report_leads_to_a_file_beside_it(main_report: Path) -> None:
    """Pictures and data files are relative and exist."""
    text = (main_report / "report.md").read_text()
    found = links(text)
    assert {"fig-01-forest.png", "fig-02-curves.png", "fig-03-generalisation.png", "fig-05-pictures-1.png"} <= found
    assert all((main_report / name).is_file() for name in found)


def test_every_figure_has_its_numbers_beside_it(main_report: Path) -> None:
    """A CSV for every figure, an SVG for every drawing."""
    figures = sorted(main_report.glob("fig-*.png"))
    assert len(figures) == 7
    assert all(len(read(main_report, figure.stem)) for figure in figures)
    assert len(list(main_report.glob("fig-*.svg"))) == 6


def test_injected_gains_lie_in_their_intervals_and_stand_in_the_table(main_report: Path) -> None:
    """What was put in comes out, with its interval, in figure and text."""
    rows = read(main_report, "fig-01-forest")
    truth = {"emoji-3d": 3.4, "emoji-3d-heldout": 1.9, "object-accuracy": -0.27}
    for reward, gain in truth.items():
        row = rows[(rows["arm"] == "draft") & (rows["reward"] == reward)].iloc[0]
        assert row["low"] <= gain <= row["high"]
    text = (main_report / "report.md").read_text()
    row = read(main_report, "table-rewards-1").set_index("arm").loc["draft"]
    shown = f"+{row['gain']:.2f} [+{row['gain low']:.2f}, +{row['gain high']:.2f}]"
    assert f"| {shown} |" in text


def test_figures_show_what_the_records_say(main_run: Path, main_report: Path) -> None:
    """Seed gains recomputed the long way, from the parquet files alone."""
    tables = {path.parent.name: pd.read_parquet(path) for path in (main_run / "cells").glob("*/scores.parquet")}
    keys = ["prompt_id", "noise_id"]

    def chosen(cell: str, point: str = "final") -> pd.Series:
        rows = tables[cell]
        mine = rows[(rows["reward"] == "emoji-3d") & (rows["split"] == "held-out") & (rows["point"] == point)]
        return mine.set_index(keys)["score"]

    forest = read(main_report, "fig-01-forest")
    curves = read(main_report, "fig-02-curves")
    for seed in range(5):
        gain = chosen(f"draft--emoji-3d--seed{seed}") - chosen("base")
        expected = gain.groupby("prompt_id").mean().mean()
        row = forest[(forest["arm"] == "draft") & (forest["reward"] == "emoji-3d") & (forest["seed"] == seed)]
        assert row["gain"].item() == pytest.approx(expected, rel=1e-9)

        early = (chosen(f"draft--emoji-3d--seed{seed}", "32") - chosen("base")).dropna()
        row = curves[(curves["arm"] == "draft") & (curves["seed"] == seed) & (curves["point"] == 0)]
        assert row["gain"].item() == pytest.approx(early.mean(), rel=1e-9)
        assert row["queries"].item() == 32


def test_differences_are_drawn_from_the_gains_of_the_forest(main_report: Path) -> None:
    """Estimate and interval are Welch's on the seeds of the forest; the ratio of diversity is to the base's."""
    forest = read(main_report, "fig-01-forest")
    gains = forest[forest["reward"] == "emoji-3d"].groupby("arm", sort=False)["gain_base_sd"]
    draft, ddpo = (gains.get_group(arm).to_numpy() for arm in ("draft", "ddpo"))
    row = read(main_report, "fig-07-differences").iloc[0]
    test = stats.ttest_ind(draft, ddpo, equal_var=False).confidence_interval()
    assert row["difference"] == pytest.approx(draft.mean() - ddpo.mean(), rel=1e-9)
    assert (row["low"], row["high"]) == pytest.approx((test.low, test.high), rel=1e-9)
    headline = read(main_report, "table-1-headline").set_index("arm").loc["draft"]
    assert 0 < headline["vendi ratio"] < 1
    assert headline["drift_latent_rms"] > 0


def test_conclusions_come_first_and_say_what_the_gain_cost(main_report: Path) -> None:
    """Verdict, p and the loss of the gold metric stand before any table."""
    text = (main_report / "report.md").read_text()
    start = text[: text.index("## Headline")]
    assert "ddpo is worse than draft" in start
    assert "adjusted p = 0.008" in start
    assert re.search(r"while emoji-3d rose, object-accuracy .* fell with \*\*draft\*\* −0\.2", start)
    assert "**ddpo** −" not in start


def test_tables_are_narrow_enough_and_rectangular(main_report: Path) -> None:
    """At most nine columns, the same number in every row."""
    lines = (main_report / "report.md").read_text().splitlines()
    widths = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines if line.startswith("| ")]
    assert max(widths) <= 9
    runs = re.findall(r"(?:^\|.*\n)+", "\n".join(lines), flags=re.M)
    assert runs
    assert all(len({len(re.findall(r"(?<!\\)\|", line)) for line in run.splitlines()}) == 1 for run in runs)


def test_same_bytes_from_shuffled_records_in_another_place(main_report: Path, tmp_path: Path) -> None:
    """Neither row order, nor place, nor time enters."""
    run = write_run(tmp_path / "elsewhere", main_job(), shuffle=3)
    again = build_report(run).parent
    names = sorted(path.name for path in main_report.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    names.remove("report.html")  # it knows where the run's pictures lie; tests/report/test_page.py has its own
    assert [name for name in names if (main_report / name).read_bytes() != (again / name).read_bytes()] == []


def test_cells_are_linked_to_their_records(tmp_path: Path) -> None:
    """In the run's own report, and only where there is a record; a report elsewhere has no such links."""
    made = main_job(seeds=2, images=False, missing=("ddpo--emoji-3d--seed1",))
    run = write_run(tmp_path / "run", made)
    text = build_report(run).read_text()
    links = re.findall(r"\]\((\S+status\.json)\)", text)
    assert len(links) == 4  # the base model, two of one arm, one of the other
    assert all((run / "report" / link).is_file() for link in links)
    elsewhere = build_report(run, tmp_path / "out").read_text()
    assert "status.json" not in elsewhere
    assert re.sub(r"\[([^\]]+)\]\(\S+status\.json\)", r"\1", text) == elsewhere
    assert list(tmp_path.glob(".out*")) == []


def test_a_partial_run_says_what_is_missing(tmp_path: Path) -> None:
    """Crashed and unfinished cells are missing, diverged ones count; all of it is said."""
    lost = "ddpo--emoji-3d--seed1"
    made = main_job(
        missing=("ddpo--emoji-3d--seed4",),
        crashed=("draft--emoji-3d--seed0",),
        diverged=(lost,),
        no_scores=(lost,),
        gold_on=6,
        images=False,
    )
    folder = build_report(write_run(tmp_path, made)).parent
    text = (folder / "report.md").read_text()
    assert "7 of 10 planned cells are complete; 1 diverged" in text
    assert "1 crashed and must be run again; 1 cell not finished" in text
    assert "applies to 6 of 10 held-out prompts" in text
    assert "No pictures were kept" in text
    forest = read(folder, "fig-01-forest").set_index(["arm", "reward", "seed"])["gain"]
    assert forest["ddpo", "emoji-3d", 1] == 0.0
    assert np.isnan(forest["draft", "emoji-3d", 0])
    assert np.isnan(forest["ddpo", "emoji-3d", 4])
    assert read(folder, "table-rewards-1").set_index("arm").loc["ddpo", "n"] == 4


def test_one_method_and_one_seed_give_no_interval_and_no_comparison(tmp_path: Path) -> None:
    """One seed has no interval, one method no opponent."""
    made = main_job(arms=("draft",), seeds=1, images=False, metrics=False)
    folder = build_report(write_run(tmp_path, made)).parent
    text = (folder / "report.md").read_text()
    assert "(n=1)" in text
    assert "nothing to compare it with" in text
    assert read(folder, "fig-01-forest")["low"].isna().all()


def test_a_run_without_any_score_still_reports(tmp_path: Path) -> None:
    """A run that has only a plan gives a report that says so."""
    cells = ("base", *(f"{arm}--emoji-3d--seed{seed}" for arm in ("draft", "ddpo") for seed in range(5)))
    text = build_report(write_run(tmp_path, main_job(missing=cells))).read_text()
    assert "0 of 10 planned cells are complete" in text
    assert "base model is not scored yet" in text


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """Markup in prompts and labels is shown, not obeyed."""
    prompts = (
        "a `cat` | a <b>dog</b> & $x_1$ \\frac",
        "![x](y) [link](http://e) **bold**\n# title",
        "<script>&lt;",
        "é 猫 🐈",
    )
    made = main_job(
        arms=("draft K=5 | <i>`", "ddpo $_$"),
        seeds=2,
        prompts={"training": prompts[:2], "held-out": prompts},
        diverged=("ddpo $_$--emoji-3d--seed0",),
    )
    text = build_report(write_run(tmp_path, made)).read_text()
    outside = re.sub(r'alt="[^"]*"', "", text)
    assert "<i>" not in text
    assert "<script>" not in text
    assert "](y)" not in outside.replace("\\](y)", "")
    assert "| draft K=5 \\|" in text or "**draft K=5 \\| &lt;i&gt;\\`**" in text


def test_weighted_sums_are_scored_from_their_components(tmp_path: Path) -> None:
    """A weighted sum that was trained on gets its score from recorded components."""
    made = main_job(training_rewards=("2*emoji-3d+1*emoji-clip",), seeds=2, images=False, metrics=False)
    run = load_run(write_run(tmp_path, made))
    rows = run.scores.pivot_table(index=["cell", "point", "prompt_id", "noise_id"], columns="reward", values="score")
    total = 2 * rows["emoji-3d"] + rows["emoji-clip"]
    assert np.allclose(rows["2*emoji-3d+1*emoji-clip"], total)
    assert run.rewards[0].name == "2*emoji-3d+1*emoji-clip"


def test_more_than_eight_rewards_and_unscored_ones(tmp_path: Path) -> None:
    """Many rewards fit; one without scores is left out."""
    extra = tuple((f"extra-{i}", "proxy", "score") for i in range(6))
    made = main_job(rewards=(*Made().rewards, *extra), seeds=2, images=False)
    write_run(tmp_path, made)
    for path in (tmp_path / "cells").glob("*/scores.parquet"):
        table = pd.read_parquet(path)
        table[table["reward"] != "extra-5"].to_parquet(path, index=False)
    with drawing():
        drawn = heatmap(analyse(load_run(tmp_path)), "fig")
    assert drawn is not None
    assert set(drawn.data["reward"]) == {name for name, _, _ in made.rewards} - {"extra-5"}


@pytest.mark.slow
def test_fifty_four_cells(tmp_path: Path) -> None:
    """Six methods on three rewards with three seeds."""
    folder = build_report(write_run(tmp_path, grid_job(images=False))).parent
    text = (folder / "report.md").read_text()
    assert "53 of 54 planned cells are complete; 1 diverged" in text
    assert "scored with a single latent" in text
    assert len(read(folder, "fig-03-generalisation")) == 6 * 3 * 6
    assert len(read(folder, "table-2-comparisons")) == 5


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    """The mistake is named."""
    with pytest.raises(UserError, match="not a run directory"):
        build_report(tmp_path)


def test_a_report_needs_no_torch(main_run: Path) -> None:
    """Reports are made without importing torch."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "import harness.report.build\n"
        "from harness.report.analysis import analyse\n"
        "from harness.report.records import load_run\n"
        f"analyse(load_run(Path({str(main_run)!r})))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
