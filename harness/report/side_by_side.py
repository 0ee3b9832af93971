"""Several runs in one report: what differs between them, their gains side by side, and what may be compared.

Every run keeps its own base model and its own base SD. Arms of different runs are independent samples of training
seeds (Welch): equal seeds of different runs are not taken as pairs. A reward is compared only where both runs judged
the same prompts with the same latents by the same version of it; what is left out is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from harness.report import formatting as f
from harness.report.account import data_date, flatten
from harness.report.analysis import MARGIN, Analysis, analyse
from harness.report.build import build_report, environment, tidy
from harness.report.captions import INTERVAL, Drawn, sample
from harness.report.folder import REPORT, replacing
from harness.report.forest import forest_rows
from harness.report.narrative import bold_verdict
from harness.report.page.write import PAGE, write_plain_page
from harness.report.records import HELD_OUT, load_run
from harness.report.style import INK, drawing, looks, roomy, write_figure, zero_line
from harness.report.tables import Table, bounds, verdict_text
from harness.report.writing import write_csv
from harness.stats.intervals import seed_t
from harness.stats.verdict import Judgement, Pair, Procedure, judge

REPEATED = ("command", "started", "model", "suite")  # the plan's, or different for every run
RESOLVED = ("methods", "arms", "settings", "rewards", "seeds", "model", "suite", "budget", "sampler", "findings")
# What a gain depends on.
DECISIVE = ("budget.amount", "budget.unit", "sampler.", "model.", "config.adapter.", "arm ")
PLAN = ("config", "model", "suite", "sampler", "budget", "seeds", "training_rewards")


def build_side_by_side(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write `out/report.md` and `out/report.html`, and the whole report of each run beside them in `run-1`, `run-2` ...

    The same records give the same bytes; the order of the runs decides the order in the report, and which is first.

    Raises:
        UserError: if a directory holds no run of this schema, or `out` has other files and no report.
    """
    analyses = [analyse(load_run(folder)) for folder in run_dirs]
    names = _names(analyses)
    with replacing(out) as folder:
        for i, run_dir in enumerate(run_dirs):
            build_report(run_dir, folder / f"run-{i + 1}")
        judgements, left_out = _judged(analyses, names)
        with drawing():
            forest = _forest(analyses, names)
            if forest is not None:
                write_figure(forest.figure, folder / forest.name)
                write_csv(forest.data, folder / f"{forest.name}.csv")
        settings = differing_settings(analyses, names)
        content: dict[str, Any] = {
            "title": f"{f.markdown(f.joined(names))} side by side",
            "lead": (
                f"{f.plural(len(names), 'run')}, each with its own base model: gains are differences to the base model "
                "of the same run on identical prompts and latents, in the spread of that base model's pictures."
            ),
            "settings": settings,
            "caution": caution(settings) if judgements else "",
            "verdicts": [bold_verdict(j.sentence) for j in judgements] or ["Nothing can be compared between the runs."],
            "left_out": left_out,
            "comparisons": _comparisons(judgements),
            "gains": _gains(analyses, names),
            "forest": forest,
            "runs": [
                _link(i, name, analysis) for i, (name, analysis) in enumerate(zip(names, analyses, strict=True), 1)
            ],
        }
        for table in (content["settings"], content["comparisons"], content["gains"]):
            if table.rows:
                write_csv(table.data, folder / f"{table.name}.csv")
        text = tidy(environment().get_template("side_by_side.md.j2").render(content))
        (folder / REPORT).write_text(text, encoding="utf-8")
        write_plain_page(text, folder)
    return out / REPORT


def _names(analyses: Sequence[Analysis]) -> list[str]:
    """The runs' names, with a number where two are equal."""
    names = [analysis.run.name for analysis in analyses]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _link(place: int, name: str, analysis: Analysis) -> str:
    """Where the whole report of a run is."""
    reports = f"[page](run-{place}/{PAGE}), [text](run-{place}/{REPORT})"
    return f"{f.markdown(name)}, data of {data_date(analysis.run)}: {reports}"


def _label(analyses: Sequence[Analysis], names: Sequence[str], place: int, arm: str) -> str:
    """An arm's label, with its run where another run has one of the same label."""
    shared = sum(arm in analysis.run.arms for analysis in analyses) > 1
    return f"{arm} [{names[place]}]" if shared else arm


# ------------------------------------------------------------------------------------------------------ what differs


def differing_settings(analyses: Sequence[Analysis], names: Sequence[str]) -> Table:
    """Everything in the plans and versions that is not the same in all runs."""
    arms = set.intersection(*(set(analysis.run.arms) for analysis in analyses))
    every = [_described(analysis, arms) for analysis in analyses]
    keys = sorted({key for known in every for key in known})
    texts = {key: [_text(known.get(key)) for known in every] for key in keys}
    kept = {key: values for key, values in texts.items() if len(set(values)) > 1}
    rows = tuple((f.markdown(key), *map(f.markdown, values)) for key, values in kept.items())
    data = pd.DataFrame([{"setting": key, **dict(zip(names, values, strict=True))} for key, values in kept.items()])
    return Table("table-differences", ("setting", *map(f.markdown, names)), rows, data)


def caution(settings: Table) -> str:
    """What else than chance may have made a difference between runs; empty where they have the same settings."""
    rows = settings.data.to_dict("split")["data"]
    found = [f"{key} ({', '.join(values)})" for key, *values in rows if str(key).startswith(DECISIVE)]
    if not found:
        return ""
    return (
        f"The runs differ in {f.markdown(f.joined(found))}: a difference between their methods may come from that, and "
        "not from the methods."
    )


def _text(value: Any) -> str:
    """A value as text; 256 and 256.0 are the same, and so are what is empty and what an older version did not have."""
    if value is None or value in ([], {}, ""):
        return f.DASH
    return f.value_text(int(value) if isinstance(value, float) and value.is_integer() else value)


def _described(analysis: Analysis, arms: set[str]) -> dict[str, Any]:
    """Settings of a run, of those arms that all runs have, of its rewards and of the machine."""
    run = analysis.run
    plan = {key: run.plan[key] for key in PLAN if key in run.plan}
    # What the plan has resolved is compared as it was resolved.
    plan["config"] = {key: value for key, value in plan.get("config", {}).items() if key not in RESOLVED}
    known = flatten(plan) | {"methods": list(run.arms)}
    for arm in run.plan["arms"]:
        if arm["label"] in arms:
            known |= flatten({key: arm.get(key) for key in ("method", "version", "config")}, f"arm {arm['label']}")
    for info in run.rewards:
        known[f"reward {info.name}"] = f"version {info.version}"
    machine = {key: value for key, value in run.provenance.items() if key not in REPEATED}
    return known | {f"provenance {key}": value for key, value in flatten(machine).items()}


# ------------------------------------------------------------------------------------------------------- comparisons


def why_not_comparable(first: Analysis, other: Analysis, reward: str) -> str:
    """Why gains on a reward of two runs are not comparable; empty where they are."""
    for analysis in (first, other):
        if reward not in analysis.rewards:
            return "not scored in both runs"
    versions = {analysis.rewards[reward].version for analysis in (first, other)}
    if len(versions) > 1:
        return f"of other versions ({f.joined(sorted(versions))})"
    if first.run.judged != other.run.judged:
        return f"judged on other splits ({first.run.judged} and {other.run.judged} prompts)"
    if _pictures(first, reward) != _pictures(other, reward):
        return "judged on other prompts or latents"
    return ""


def _pictures(analysis: Analysis, reward: str) -> set[tuple[str, str, str]]:
    """(Prompt, its text, latent) of the base model's pictures."""
    scores = analysis.gains.base_scores(reward, HELD_OUT)
    if not len(scores.seeds):
        return set()
    found = np.argwhere(np.isfinite(scores.values[0]))
    texts = [analysis.run.prompt_text(str(prompt)) for prompt in scores.prompts]
    return {(str(scores.prompts[i]), texts[i], str(scores.pictures[k])) for i, k in found.tolist()}


def _judged(analyses: Sequence[Analysis], names: Sequence[str]) -> tuple[tuple[Judgement, ...], list[str]]:
    """Each later run's arms against those of the same label in the first run, or else against its reference."""
    first, pairs, left_out = analyses[0], [], []
    for place, other in enumerate(analyses[1:], 1):
        shared = [reward for reward in other.run.training_rewards if reward in first.run.training_rewards]
        alone = [reward for reward in other.run.training_rewards if reward not in shared]
        reasons = {reward: why_not_comparable(first, other, reward) for reward in shared}
        reasons |= dict.fromkeys(alone, f"not trained on in {names[0]}")
        left_out += [
            f"{f.markdown(names[place])}, {f.markdown(reward)}: {f.markdown(reason)}."
            for reward, reason in reasons.items()
            if reason
        ]
        rewards = [reward for reward in shared if not reasons[reward]]
        same = [arm for arm in other.run.arms if arm in first.run.arms]
        for arm in same or other.run.arms if rewards else ():
            against = arm if same else first.run.reference
            pairs.append(
                Pair(
                    _label(analyses, names, place, arm),
                    _label(analyses, names, 0, against),
                    [other.final(arm, reward).standardised for reward in rewards],
                    [first.final(against, reward).standardised for reward in rewards],
                    MARGIN,
                    arm in other.run.constants,
                    against in first.run.constants,
                )
            )
        if same and rewards and (lonely := [arm for arm in other.run.arms if arm not in same]):
            left_out.append(
                f"{f.markdown(f.joined(lonely))} of {f.markdown(names[place])}: no method of that label in "
                f"{f.markdown(names[0])}."
            )
    return judge(pairs, Procedure.WELCH, unit="own base SD") if pairs else (), left_out


def _comparisons(judgements: Sequence[Judgement]) -> Table:
    headers = ("arm vs arm", "difference (own base SD)", "p", "adjusted p", "P(better)", "verdict")
    rows = tuple(
        (
            *(f"{f.markdown(j.arm)} vs {f.markdown(j.reference)}", f.estimate(j.difference)),
            *(f.p_value(j.comparison.p), f.p_value(j.adjusted_p), f.estimate(j.probability, sign=False)),
            verdict_text(j),
        )
        for j in judgements
    )
    data = pd.DataFrame(
        [
            {"arm": j.arm, "reference": j.reference, "p": j.comparison.p, "adjusted_p": j.adjusted_p}
            | bounds("difference own base SD", j.difference)
            | bounds("p_better", j.probability)
            | {"detectable": j.detectable, "verdict": j.verdict.value}
            for j in judgements
        ]
    )
    note = (
        "Gains on the training rewards that are comparable, mean over these; Welch's test on seed means: seeds of "
        "different runs are independent and not paired; Holm over these comparisons."
    )
    return Table("table-comparisons", headers, rows, data, note)


# -------------------------------------------------------------------------------------------------------------- gains


def _gains(analyses: Sequence[Analysis], names: Sequence[str]) -> Table:
    """One row per training reward, run and arm."""
    headers = ("trained on", "run", "method", "gain", "gain (own base SD)", "base model", "base SD", "seeds")
    rows, data = [], []
    for reward, place, arm in _places(analyses):
        analysis = analyses[place]
        gain = analysis.final(arm, reward)
        inside = seed_t(gain.standardised)
        rows.append(
            (
                *(f.markdown(reward), f.markdown(names[place]), f"**{f.markdown(arm)}**", f.estimate(gain.interval)),
                *(f.estimate(inside), f.significant(gain.base_mean), f.significant(gain.sd)),
                f"{gain.interval.n}/{gain.runs.planned}",
            )
        )
        record: dict[str, object] = {"training_reward": reward, "run": names[place], "arm": arm}
        record |= bounds("gain", gain.interval) | bounds("gain own base SD", inside)
        data.append(record | {"base_mean": gain.base_mean, "base_sd": gain.sd, "n": gain.interval.n})
    note = "Held-out prompts, mean over training seeds with 95 % t interval; base model and base SD: of the same run."
    return Table("table-gains", headers, tuple(rows), pd.DataFrame(data), note)


def _places(analyses: Sequence[Analysis]) -> list[tuple[str, int, str]]:
    """(Training reward, run, arm), rewards outermost, in the order of the runs."""
    rewards = dict.fromkeys(reward for analysis in analyses for reward in analysis.run.training_rewards)
    return [
        (reward, place, arm)
        for reward in rewards
        for place, analysis in enumerate(analyses)
        if reward in analysis.run.training_rewards
        for arm in analysis.run.arms
    ]


def _forest(analyses: Sequence[Analysis], names: Sequence[str]) -> Drawn | None:
    """Gains in base SD, one panel per training reward; None without any gain."""
    places = [place for place in _places(analyses) if analyses[place[1]].final(place[2], place[0]).exists]
    rewards = list(dict.fromkeys(reward for reward, _, _ in places))
    if not places:
        return None
    counts = [sum(place[0] == reward for place in places) for reward in rewards]
    figure = Figure(figsize=(8.5, 0.6 + sum(0.7 + 0.36 * count for count in counts)), layout=roomy())
    grid = figure.subplots(len(rewards), 1, squeeze=False, height_ratios=[0.7 + 0.36 * c for c in counts])[:, 0]
    look = looks(names)
    rows: list[dict[str, object]] = []
    told = []
    for axes, reward in zip(grid, rewards, strict=True):
        axes.grid(axis="x")
        zero_line(axes, vertical=True)
        labels = []
        for y, (_, place, arm) in enumerate(found for found in places if found[0] == reward):
            gain, drawn = analyses[place].final(arm, reward), look[names[place]]
            interval = seed_t(gain.standardised)
            if np.isfinite(interval.half_width):
                axes.barh(y, 2 * interval.half_width, left=interval.low, height=0.5, color=drawn.colour, alpha=0.28)
            axes.plot([interval.estimate] * 2, [y - 0.25, y + 0.25], color=INK, linewidth=2, zorder=3)
            dots = y + np.linspace(-0.15, 0.15, len(gain.values))
            axes.plot(gain.standardised, dots, drawn.marker, color=drawn.colour, markersize=5, zorder=4)
            labels.append(f"{arm} [{names[place]}]")
            rows += [{"run": names[place], **row} for row in forest_rows(gain, analyses[place].unit(reward))]
            told.append(f"{arm} of {names[place]} on {reward} {f.estimate(interval)}")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_title(reward)
    grid[-1].set_xlabel("gain (own base SD) →")
    data = pd.DataFrame(rows)
    caption = (
        "Gain over the base model of the same run (the line at 0) on the training reward, held-out prompts, in that "
        f"base model's spread. Bar: {INTERVAL}; tick: mean; dots: training seeds ({sample(data).text}); colour and "
        "marker: the run."
    )
    alt = f"Gains of several runs in own base SD: {f.joined(told)}."
    return Drawn("fig-01-gains", "Gains side by side", figure, data, caption, alt)
