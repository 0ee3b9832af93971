"""Tables of results: cells as text for Markdown, and the same numbers unrounded for CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.report import formatting as f
from harness.report.analysis import DIVERSITY, Analysis, held_out_name
from harness.report.heatmap import matrix_rows
from harness.report.records import Cell, Run
from harness.stats.intervals import Interval, seed_t
from harness.stats.verdict import Judgement, Verdict


@dataclass(frozen=True, eq=False)
class Table:
    """One table.

    Attributes:
        name: File name of its CSV, without suffix.
        headers, rows: Text for Markdown, already escaped.
        data: Unrounded numbers.
        note: What the columns mean, in one or two sentences.
    """

    name: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    data: pd.DataFrame
    note: str = ""

    @property
    def markdown(self) -> str:
        """The table in GitHub's notation: first column left, others right where they are numbers."""
        if not self.rows:
            return "*Nothing to show.*"
        columns = list(zip(*self.rows, strict=True))[1:]
        rule = ("---", *("---:" if _numeric(column) else "---" for column in columns))
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.headers, rule, *self.rows))


def _numeric(column: Sequence[str]) -> bool:
    shown = [text for text in column if text and text != f.DASH]
    return bool(shown) and all(text[0] in "+−<[0123456789" for text in shown)


def arm_name(run: Run, arm: str) -> str:
    """An arm's label, with a dagger where the arm changes no weights, and a double one where it was made elsewhere."""
    return f"**{f.markdown(arm)}**{' †' * (arm in run.inference)}{' ‡' * (arm in run.given)}"


def inference_note(run: Run) -> str:
    """What the daggers mean; empty where no arm has one."""
    if not run.untrained:
        return ""
    constants = [f.markdown(arm) for arm in run.constants]
    fixed = f" No seed variance, one value each: {f.joined(constants)}." if constants else ""
    note = " †: changes no weights, was not trained, and spends queries and rows on each picture it generates."
    given = " ‡: made elsewhere, not trained by this run; what it has cost is not known."
    return note * bool(run.inference) + given * bool(run.given) + fixed


def headline(analysis: Analysis) -> Table:
    """T1: one row per method, what it gained and what that cost."""
    run = analysis.run
    rewards = [reward for reward in run.training_rewards if reward in analysis.rewards]
    witnesses = [(reward, name) for reward in rewards if (name := held_out_name(analysis, reward))]
    gold = analysis.gold()[:1]
    base_vendi = analysis.gains.base_metric(DIVERSITY)
    target = rewards[0] if len(rewards) == 1 else "training rewards"
    drift = drift_metric(analysis)
    headers = ["method", f"gain on {f.markdown(target)} (base SD)", "all other rewards (base SD)"]
    headers += ["held-out measure (base SD)"] * bool(witnesses)
    headers += [f"{f.markdown(name)} (gold)" for name in gold]
    headers += ["diversity (Vendi, of the base's)"] * bool(np.isfinite(base_vendi))
    headers += [DRIFTS[drift]] if drift else []
    headers += ["seeds"]
    first: list[str] = ["base model", "0", "0"] + ["0"] * bool(witnesses)
    first += [f.significant(analysis.final(run.arms[0], rewards[0], name).base_mean) for name in gold if rewards]
    first += [f"1 (score {f.fixed(base_vendi, 2)})"] * bool(np.isfinite(base_vendi)) + ["0"] * bool(drift) + [f.DASH]
    rows, data = [tuple(first)], []
    for arm in run.arms:
        intervals = {"gain": analysis.pooled(arm, [(reward, reward) for reward in rewards])}
        intervals["off-target"] = analysis.matrices[arm].off_target
        if witnesses:
            intervals["held-out"] = analysis.pooled(arm, witnesses)
        for name in gold:
            intervals[name] = analysis.pooled(arm, [(reward, name) for reward in rewards], standardise=False)
        row = [arm_name(run, arm), *(f.estimate(interval) for interval in intervals.values())]
        vendi = seed_t([analysis.diversity(arm, reward) for reward in run.training_rewards])
        ratio = f.scaled(vendi, 1 / base_vendi) if base_vendi > 0 else vendi
        row += [f.estimate(ratio, sign=False)] * bool(np.isfinite(base_vendi))
        drifted = seed_t([analysis.gains.metric(arm, reward, drift) for reward in run.training_rewards])
        row += [f.estimate(drifted, sign=False)] * bool(drift)
        cells = [cell for cell in run.cells if cell.arm == arm]
        row.append(seeds_text(analysis, arm))
        rows.append(tuple(row))
        record: dict[str, object] = {"arm": arm}
        for name, interval in {**intervals, "vendi": vendi, "vendi ratio": ratio, drift or "drift": drifted}.items():
            record |= {name: interval.estimate, f"{name} low": interval.low, f"{name} high": interval.high}
        record |= {"queries": _mean(cells, "queries"), "train_seconds": _average(_seconds(cells))}
        record["queries a picture"] = _mean(cells, "queries", "generation_cost")
        data.append(
            record | {state: sum(c.state == state for c in cells) for state in STATES} | {"planned": len(cells)}
        )
    note = "Gains over the base model on held-out prompts, mean over training seeds with 95 % t interval."
    note += " All other rewards: the mean over everything scored that was not trained on."
    if drift == DRIFT:
        note += " Drift: root mean square distance of final latents to the base model's from the same latents; the "
        note += "sampler of the evaluation is deterministic, so that a path KL is not defined."
    if len(rewards) > 1:
        note += " Equal-weight mean over the training rewards, which are these and no sample of others."
    return Table("table-1-headline", tuple(headers), tuple(rows), pd.DataFrame(data), note + inference_note(run))


PATH_KL, DRIFT = "path_kl", "drift_latent_rms"
DRIFTS = {PATH_KL: "path KL to the base", DRIFT: "drift from the base"}


def drift_metric(analysis: Analysis) -> str:
    """How far models moved: the path KL where it was recorded, else the drift of latents; empty without either."""
    return next((name for name in DRIFTS if analysis.gains.metric_points(name)), "")


def prices(analysis: Analysis) -> Table:
    """T1, second half: what each method spent, and what may be said about it."""
    run = analysis.run
    headers = ("method", "reward queries", "training time (s)", "adjusted p", "P(better)", "verdict")
    found = {j.arm: j for j in analysis.primary}
    rows, data = [], []
    for arm in run.arms:
        cells = [cell for cell in run.cells if cell.arm == arm]
        spent = (f.count(_mean(cells, "queries")), f.spread(_seconds(cells)))
        if arm in run.inference:
            spent = (f"{f.count(_mean(cells, 'queries', 'generation_cost'))} a picture", f.DASH)
        elif arm in run.given:
            spent = (f.DASH, f.DASH)
        said: tuple[str, ...] = (f.DASH, f.DASH, "the reference")
        j = found.get(arm)
        if j:
            said = (f.p_value(j.adjusted_p), f.estimate(j.probability, sign=False), verdict_text(j))
        rows.append((arm_name(run, arm), *spent, *said))
        record: dict[str, object] = {"arm": arm, "queries": _mean(cells, "queries")}
        record |= {"train_seconds": _average(_seconds(cells))}
        if j:
            record |= {"adjusted_p": j.adjusted_p, "verdict": j.verdict.value} | bounds("p_better", j.probability)
        data.append(record)
    note = (
        f"Adjusted p (Holm), P(better) and verdict: against {f.markdown(run.reference)}, by the gain on the training "
        "reward; all numbers of these tests are in the next table."
    )
    return Table("table-1-prices", headers, tuple(rows), pd.DataFrame(data), note + inference_note(run))


STATES = ("completed", "diverged", "crashed", "running", "planned")


def seeds_text(analysis: Analysis, arm: str) -> str:
    """``5/5``, or ``4/5 (1 diverged)``; the smallest over training rewards. An arm without seed variance says so."""
    counts = []
    for reward in analysis.run.training_rewards:
        cells = analysis.run.cells_of(arm, reward)
        counts.append((sum(cell.counts for cell in cells), len(cells), sum(cell.state == "diverged" for cell in cells)))
    done, planned, _ = min(counts)
    diverged = sum(count[2] for count in counts)
    fixed = "one value, no seed variance" if arm in analysis.run.constants and done == planned else f"{done}/{planned}"
    return fixed + (f" ({diverged} diverged)" if diverged else "")


def comparisons(analysis: Analysis, name: str = "table-2-comparisons") -> Table:
    """The primary family: each arm against the reference."""
    run, judgements = analysis.run, analysis.primary
    headers = (
        *("method vs reference", "difference (base SD)", "95 % interval", "simultaneous interval"),
        *("p", "adjusted p", "P(better)", "verdict"),
    )
    rows = [
        (
            f"{_plain_name(run, j.arm)} vs {_plain_name(run, j.reference)}",
            f.fixed(j.difference.estimate, f.decimals(j.difference.half_width), sign=True),
            f.bounds(j.difference),
            f.bounds(j.simultaneous),
            f.p_value(j.comparison.p),
            f.p_value(j.adjusted_p),
            f.estimate(j.probability, sign=False),
            verdict_text(j),
        )
        for j in judgements
    ]
    data = pd.DataFrame([_judgement_row("", j, 1.0) for j in judgements])
    note = (
        "Positive: the method gains more than the reference. p: exact permutation of seeds within training rewards; "
        "adjusted p: Holm over these comparisons; simultaneous: Bonferroni over them. P(better): chance that a seed of "
        "the method beats one of the reference. Verdicts rest on adjusted p and P(better), not on the "
        "unadjusted interval."
    )
    if run.constants:
        note += " Against an arm without seed variance, p is that of the other arm's one-sample t test."
    return Table(name, headers, tuple(rows), data, note + inference_note(run))


def verdict_text(judgement: Judgement) -> str:
    """The verdict; with the difference that could have been found where none was."""
    if judgement.verdict is Verdict.NOT_SEPARATED and np.isfinite(judgement.detectable):
        return f"{judgement.verdict.value} (80 % power from {f.significant(judgement.detectable, 2)})"
    return judgement.verdict.value


def rewards_by_method(analysis: Analysis, training_reward: str) -> Table:
    """T2: one row per method, on the reward it was trained on."""
    headers = (
        *("method", f"mean ({f.markdown(analysis.unit(training_reward))})", "gain, held-out prompts"),
        *("gain (base SD)", "gain, training prompts", "min … max seed", "seeds", "prompts × pictures"),
    )
    rows, data = [], []
    for arm in analysis.run.arms:
        gain = analysis.final(arm, training_reward)
        seen = analysis.final(arm, training_reward, split="training")
        values = gain.values[np.isfinite(gain.values)]
        raw = _shifted(gain.interval, gain.base_mean)
        places = f.decimals(gain.interval.half_width)
        extremes = [f.fixed(float(v), places, sign=True) for v in (values.min(), values.max())] if len(values) else []
        rows.append(
            (
                arm_name(analysis.run, arm),
                f.estimate(raw),
                f.estimate(gain.interval),
                f.estimate(seed_t(gain.standardised)),
                f.estimate(seen.interval),
                " … ".join(extremes) or f.DASH,
                seeds_text(analysis, arm)
                if arm in analysis.run.constants and len(values)
                else f"{len(values)}/{gain.runs.planned}",
                f"{gain.prompts} × {gain.pictures // max(gain.prompts, 1)}",
            )
        )
        record: dict[str, object] = {
            "training_reward": training_reward,
            "arm": arm,
            "unit": analysis.unit(training_reward),
        }
        record |= bounds("mean", raw) | bounds("gain", gain.interval) | bounds("training gain", seen.interval)
        record |= bounds("gain base SD", seed_t(gain.standardised))
        record |= {"base_mean": gain.base_mean, "base_sd": gain.sd, "n": gain.interval.n, "planned": gain.runs.planned}
        data.append(record | {"prompts": gain.prompts, "pictures": gain.pictures})
    base = analysis.final(analysis.run.arms[0], training_reward)
    note = (
        f"Base model: {f.significant(base.base_mean)}; one base SD is {f.significant(base.sd)} "
        f"({f.markdown(analysis.unit(training_reward))})."
    ) + inference_note(analysis.run)
    return Table(f"table-rewards-{_index(analysis, training_reward)}", headers, tuple(rows), pd.DataFrame(data), note)


def pairwise(analysis: Analysis, training_reward: str) -> Table:
    """T3: all pairs of methods on one training reward."""
    headers = (
        *("pair", f"difference ({f.markdown(analysis.unit(training_reward))})", "difference (base SD)"),
        *("p", "adjusted p (smallest possible)", "P(better)", "found with 80 % power from (base SD)", "verdict"),
    )
    sd = analysis.gains.sd(training_reward)
    found = analysis.secondary[training_reward]
    rows = tuple(
        (
            f"{_plain_name(analysis.run, j.arm)} − {_plain_name(analysis.run, j.reference)}",
            f.estimate(f.scaled(j.difference, sd)),
            f.estimate(j.difference),
            f.p_value(j.comparison.p),
            f"{f.p_value(j.adjusted_p)} ({f.p_value(j.smallest_adjusted_p) if j.smallest_adjusted_p else 'any'})",
            f.estimate(j.probability, sign=False),
            f.significant(j.detectable, 2),
            j.verdict.value,
        )
        for j in found
    )
    data = pd.DataFrame([_judgement_row(training_reward, j, sd) for j in found])
    family = found[0].family if found else 0
    note = (
        f"Welch's test on seed means; adjusted p: Holm over {f.plural(family, 'comparison')} (all pairs and rewards)."
    ) + inference_note(analysis.run)
    return Table(f"table-pairs-{_index(analysis, training_reward)}", headers, rows, data, note)


def generalisation(analysis: Analysis) -> Table:
    """T4: summaries of the cross-reward matrices; every cell is in the CSV."""
    headers = ("method", "on target", "off target", "gap", "worst off-target cell", "losses (adjusted p < .05)")
    rows = []
    for arm, matrix in analysis.matrices.items():
        worst = f.DASH
        if matrix.worst:
            i, j = matrix.rows.index(matrix.worst[0]), matrix.columns.index(matrix.worst[1])
            worst = f"{f.estimate(matrix.cells[i][j])} on {f.markdown(matrix.worst[1])}"
            worst += f" (trained on {f.markdown(matrix.worst[0])})" if len(matrix.rows) > 1 else ""
        summaries = (f.estimate(x) for x in (matrix.on_target, matrix.off_target, matrix.gap))
        rows.append((arm_name(analysis.run, arm), *summaries, worst, str(matrix.harmed)))
    note = (
        "Mean gains in base-SD units with 95 % t intervals over seeds: on the reward trained on, on all other "
        "evaluation rewards, and their difference. Losses are exploratory (Benjamini-Hochberg within a method)."
    )
    return Table("table-generalisation", headers, tuple(rows), pd.DataFrame(matrix_rows(analysis)), note)


def matrix_table(analysis: Analysis, arm: str) -> Table:
    """T4 in full for one method: rows are evaluation rewards, columns training rewards."""
    matrix = analysis.matrices[arm]
    headers = ("evaluated on", *(f"{analysis.run.relation} {f.markdown(row)}" for row in matrix.rows))
    rows = [
        (f.markdown(column), *(f.estimate(matrix.cells[i][j]) for i in range(len(matrix.rows))))
        for j, column in enumerate(matrix.columns)
    ]
    return Table("", headers, tuple(rows), pd.DataFrame())


def raw_p(judgements: Sequence[Judgement]) -> Table:
    """Appendix: every test of both families."""
    headers = ("pair", "test", "p", "smallest p possible", "adjusted p", "smallest adjusted p possible", "verdict")
    rows = tuple(
        (
            f"{f.markdown(j.arm)} − {f.markdown(j.reference)}",
            j.comparison.test,
            f.p_value(j.comparison.p),
            f.p_value(j.comparison.smallest_p) if j.comparison.smallest_p else "any",
            f.p_value(j.adjusted_p),
            f.p_value(j.smallest_adjusted_p) if j.smallest_adjusted_p else "any",
            verdict_text(j),
        )
        for j in judgements
    )
    return Table("", headers, rows, pd.DataFrame())


def _plain_name(run: Run, arm: str) -> str:
    return arm_name(run, arm).replace("**", "")


def _judgement_row(reward: str, j: Judgement, sd: float) -> dict[str, object]:
    return {
        "training_reward": reward,
        "arm": j.arm,
        "reference": j.reference,
        **bounds("difference base SD", j.difference),
        **bounds("difference", f.scaled(j.difference, sd)),
        **bounds("simultaneous base SD", j.simultaneous),
        "test": j.comparison.test,
        "p": j.comparison.p,
        "smallest_p": j.comparison.smallest_p,
        "adjusted_p": j.adjusted_p,
        "smallest_adjusted_p": j.smallest_adjusted_p,
        **bounds("p_better", j.probability),
        "detectable base SD": j.detectable,
        "family": j.family,
        "verdict": j.verdict.value,
    }


def bounds(name: str, interval: Interval) -> dict[str, object]:
    """An interval as columns of a CSV."""
    return {name: interval.estimate, f"{name} low": interval.low, f"{name} high": interval.high}


def _shifted(interval: Interval, offset: float) -> Interval:
    return Interval(
        interval.estimate + offset, interval.low + offset, interval.high + offset, interval.level, interval.n
    )


def _index(analysis: Analysis, training_reward: str) -> int:
    return analysis.run.training_rewards.index(training_reward) + 1


def _average(values: Sequence[float]) -> float:
    kept = [value for value in values if np.isfinite(value)]
    return sum(kept) / len(kept) if kept else float("nan")


def _mean(cells: Sequence[Cell], key: str, what: str = "cost") -> float:
    return _average([float(cell.status.get(what, {}).get(key, np.nan)) for cell in cells if cell.counts])


def _seconds(cells: Sequence[Cell]) -> list[float]:
    return [float(cell.status.get("seconds", {}).get("train", np.nan)) for cell in cells if cell.counts]
