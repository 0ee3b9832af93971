"""What a run says about a claim: the statements that its preset declared, estimated and judged.

A statement is a contrast of quantities. Quantities of one training (an arm and the reward that it was trained on) are
combined within each seed; contrasts over several trainings take them as independent samples of seeds (Welch), or, where
the preset declares that arms share what is random about a seed, within seeds (paired t). A statement is confirmed by
its own 95 % interval; whether it also holds jointly with all others of its claim (Bonferroni) is said beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from harness.finding import Finding, Quantity, Statement
from harness.report import formatting as f
from harness.report.analysis import DIVERSITY, Analysis
from harness.report.gradients import log_growth, log_norm, log_relative_variance
from harness.report.mixes import mix_gain
from harness.report.tables import Table
from harness.stats.effects import standardised
from harness.stats.intervals import Interval, bonferroni, mean_part, t_interval

CONFIRMED, NOT_CONFIRMED, UNDECIDED, MISSING = "confirmed", "not confirmed", "not decidable at this size", "not run"
JOINTLY = ", also jointly"
OWN_SAMPLER, MIX = "own-sampler", "mix"
Values = Mapping[int, float]  # by training seed


@dataclass(frozen=True, eq=False)
class Judged:
    """A statement with what was found.

    Attributes:
        interval: 95 % for this statement alone. ``joint``: 95 % for all statements of the claim together.
        verdict: One of the four above. ``jointly``: whether the joint interval says the same.
    """

    statement: Statement
    interval: Interval
    joint: Interval
    verdict: str
    jointly: bool


@dataclass(frozen=True, eq=False)
class Section:
    """A claim's place in the report."""

    title: str
    claim: str
    source: str
    summary: str
    table: Table


def sections(analysis: Analysis) -> list[Section]:
    """One for each claim that the run's preset declares."""
    declared = analysis.run.plan.get("config", {}).get("findings", [])
    return [_section(analysis, Finding.model_validate(content), i + 1) for i, content in enumerate(declared)]


def judge_finding(analysis: Analysis, finding: Finding) -> list[Judged]:
    """Estimate and judge every statement."""
    level = bonferroni(0.95, len(finding.statements))
    found = []
    for statement in finding.statements:
        interval, joint = (contrast(analysis, statement, finding.paired, at) for at in (0.95, level))
        verdict = _verdict(interval, statement.beyond)
        decided = verdict in (CONFIRMED, NOT_CONFIRMED)
        found.append(
            Judged(statement, interval, joint, verdict, decided and verdict == _verdict(joint, statement.beyond))
        )
    return found


def _verdict(interval: Interval, beyond: float) -> str:
    if not math.isfinite(interval.estimate):
        return MISSING
    if interval.low > beyond:
        return CONFIRMED
    return NOT_CONFIRMED if interval.high < beyond else UNDECIDED


def contrast(analysis: Analysis, statement: Statement, paired: bool, level: float) -> Interval:
    """The interval of sum(plus) - sum(minus)."""
    signed = [(1.0, quantity) for quantity in statement.plus] + [(-1.0, quantity) for quantity in statement.minus]
    shared = _shared_amounts(analysis, [quantity for _, quantity in signed])
    groups: dict[tuple[str, ...], list[tuple[float, Values]]] = {}
    for sign, quantity in signed:
        constant = quantity.arm in analysis.run.constants
        training = ("",) if paired and not constant else (quantity.arm, quantity.trained_on or "")
        values = quantity_values(analysis, quantity, shared.get(quantity.axis or "", math.nan))
        groups.setdefault(training, []).append((sign * quantity.times, values))
    sums = [_within_seeds(terms) for terms in groups.values()]
    if any(not len(values) for values in sums):
        return Interval(math.nan, math.nan, math.nan, level, 0, note="no data")
    # A method without seed variance has one value: it shifts the contrast and adds nothing to its variance.
    random = [values for key, values in zip(groups, sums, strict=True) if key[0] not in analysis.run.constants]
    parts = [mean_part(values) for values in random]
    smallest = min((len(values) for values in random), default=0)
    return t_interval(float(sum(values.mean() for values in sums)), parts, n=smallest, level=level)


def _within_seeds(terms: Sequence[tuple[float, Values]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(S,) weighted sums over the seeds that all terms have, in order."""
    seeds = sorted(set.intersection(*({s for s, v in values.items() if math.isfinite(v)} for _, values in terms)))
    return np.array([sum(weight * values[seed] for weight, values in terms) for seed in seeds], dtype=np.float64)


def quantity_values(analysis: Analysis, q: Quantity, amount: float = math.nan) -> Values:
    """One number per training seed; empty where the run does not have it.

    Args:
        analysis: Of the run.
        q: The quantity.
        amount: Of `q.axis`, at which the gain is read off the curve.
    """
    run, gains = analysis.run, analysis.gains
    trained = q.trained_on or run.training_rewards[0]
    reward = q.reward or trained
    match q.of:
        case "gradient-norm":
            return log_norm(
                run.probes, q.arm, training_reward=trained, point=q.point or "start", guidance=_guidance(analysis, q),
                norm=q.norm, step=_step(analysis, q),
            )  # fmt: skip
        case "gradient-growth":
            point = q.point or "start"
            return log_growth(run.probes, q.arm, training_reward=trained, point=point, guidance=_guidance(analysis, q))
        case "gradient-variance":
            point, at = q.point or "start", q.at or q.arm
            per: Literal["rows", "queries"] = "queries" if q.axis == "queries" else "rows"
            return log_relative_variance(run.probes, q.arm, at_arm=at, training_reward=trained, point=point, per=per)
        case "update-seconds":
            updates = run.updates
            cells = {cell.seed: updates[updates["cell"] == cell.name] for cell in run.cells_of(q.arm, trained)}
            return {seed: math.log(mine["seconds"].mean()) for seed, mine in cells.items() if len(mine)}
        case "seconds" | "memory":
            name = "seconds_per_iteration" if q.of == "seconds" else "peak_memory_mib"
            repeated: list[Mapping[str, float]] = run.timing.get(q.arm, {}).get("repetitions", [])
            return {i: math.log(once[name]) for i, once in enumerate(repeated) if name in once}
        case "diversity":
            ratios = gains.metric(q.arm, trained, DIVERSITY) / gains.base_metric(DIVERSITY)
            return dict(zip((cell.seed for cell in run.cells_of(q.arm, trained)), ratios.tolist(), strict=True))
        case "gain":
            pass
    if q.variant == MIX:
        mix = next((m for m in run.mixes if (m["arm"], m["training_reward"]) == (q.arm, trained)), None)
        return mix_gain(gains, run.mixed, mix, reward) if mix else {}
    seeds = [cell.seed for cell in run.cells_of(q.arm, trained)]
    if q.variant == OWN_SAMPLER:
        values = standardised(gains.own_sampler(q.arm, trained, reward), gains.sd(reward))
        return dict(zip(seeds, values.tolist(), strict=True))
    if q.axis:
        return _on_axis(analysis, q, trained, reward, amount)
    gain = gains.final(q.arm, trained, reward, split=q.split, variant=q.variant, point=q.point or "final")
    return dict(zip(gain.seeds, gain.standardised.tolist(), strict=True))


def _guidance(analysis: Analysis, q: Quantity) -> float:
    return float(analysis.run.plan["sampler"]["guidance"]) if q.guidance is None else q.guidance


def _step(analysis: Analysis, q: Quantity) -> int | None:
    """Negative steps count from the end of the chain."""
    if q.step is None or q.step >= 0:
        return q.step
    return int(analysis.run.plan["sampler"]["steps"]) + q.step


def _shared_amounts(analysis: Analysis, quantities: Sequence[Quantity]) -> dict[str, float]:
    """By axis: how much every training of the statement has spent by its end, at least."""
    ends: dict[str, list[float]] = {}
    for q in quantities:
        if q.axis and q.of == "gain":
            trained = q.trained_on or analysis.run.training_rewards[0]
            spent = analysis.gains.curve(q.arm, trained, q.reward or trained).spent[q.axis]
            ends.setdefault(q.axis, []).append(float(np.nanmin(spent[:, -1])) if spent.size else math.nan)
    return {axis: min(amounts) for axis, amounts in ends.items()}


def _on_axis(analysis: Analysis, q: Quantity, trained: str, reward: str, amount: float) -> Values:
    """Gains where training has spent `amount`, between the points of each seed's curve, which begins at zero."""
    curve = analysis.gains.curve(q.arm, trained, reward)
    sd = analysis.gains.sd(reward)
    found = {}
    for seed, values, spent in zip(curve.seeds, curve.values, curve.spent[q.axis or "queries"], strict=True):
        known = np.isfinite(values) & np.isfinite(spent)
        if known.any() and math.isfinite(amount):
            found[seed] = float(np.interp(amount, [0.0, *spent[known]], [0.0, *values[known]])) / sd
    return found


def _section(analysis: Analysis, finding: Finding, number: int) -> Section:
    judged = judge_finding(analysis, finding)
    name = f"table-finding-{number}"
    headers = ("statement", "estimate", "95 % for all statements together", "seeds", "verdict")
    rows, data = [], []
    for item in judged:
        s, beyond = item.statement, f" (must exceed {item.statement.beyond:g})" if item.statement.beyond else ""
        shown = f.DASH if item.verdict == MISSING else f"{f.estimate(item.interval)} {f.markdown(s.unit)}{beyond}"
        together = f.DASH if item.verdict == MISSING else f.bounds(item.joint)
        word = f"**{item.verdict}**{JOINTLY if item.jointly else ''}"
        rows.append((f.markdown(s.text), shown, together, str(item.interval.n or f.DASH), word))
        data.append(
            {"statement": s.text, "unit": s.unit, "beyond": s.beyond, "estimate": item.interval.estimate}
            | {"low": item.interval.low, "high": item.interval.high, "n": item.interval.n}
            | {"joint_low": item.joint.low, "joint_high": item.joint.high, "joint_level": item.joint.level}
            | {"verdict": item.verdict, "jointly": item.jointly, "note": item.interval.note}
        )
    how = "within seeds, which arms share" if finding.paired else "between independent seeds (Welch)"
    note = (
        f"Each line is a difference or a sum that the claim expects above zero, with a 95 % t interval over training "
        f"seeds; differences of trainings are taken {how}. Confirmed: this interval lies above zero; not confirmed: "
        f"below; else not decidable at this size. {JOINTLY.removeprefix(', ').capitalize()}: so does the wider "
        f"interval, which holds for all {f.plural(len(judged), 'statement')} together (Bonferroni)."
    )
    table = Table(name, headers, tuple(rows), pd.DataFrame(data), note)
    return Section(
        f.markdown(finding.title), f.markdown(finding.claim), f.markdown(finding.source), _summary(judged), table
    )


def _summary(judged: Sequence[Judged]) -> str:
    """Counts by verdict."""
    counts = {verdict: sum(item.verdict == verdict for item in judged) for verdict in
              (CONFIRMED, NOT_CONFIRMED, UNDECIDED, MISSING)}  # fmt: skip
    together = {verdict: sum(item.verdict == verdict and item.jointly for item in judged) for verdict in counts}
    jointly = {verdict: f" ({together[verdict]} also jointly)" if together[verdict] else "" for verdict in counts}
    parts = [f"{number} {verdict}{jointly[verdict]}" for verdict, number in counts.items() if number]
    return f"Of {f.plural(len(judged), 'statement')}: {f.joined(parts)}."
