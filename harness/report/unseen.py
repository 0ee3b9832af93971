"""Gains and differences for prompts that a run has not seen, beside those for its suite."""

from __future__ import annotations

import pandas as pd

from harness.report import formatting as f
from harness.report.analysis import Analysis
from harness.report.planning import less, pilot
from harness.report.tables import Table, arm_name, bounds, inference_note
from harness.stats.comparisons import welch
from harness.stats.intervals import NAN, Interval, crossed, crossed_difference, seed_t
from harness.stats.seed_means import SeedScores
from harness.stats.variance import complete

NOTHING = Interval(NAN, NAN, NAN)
SUITE, UNSEEN = "this suite", "unseen prompts"


def unseen_prompts(analysis: Analysis) -> Table:
    """For every training reward and method: the gain, and the difference to the reference, each with both intervals.

    What was made elsewhere or has no seed variance is one instance: its interval for unseen prompts is that instance's
    on other prompts, from its spread over prompts alone.
    """
    run, found = analysis.run, pilot(analysis)
    single = [arm for arm in run.arms if arm in {*run.given, *run.constants}]
    others = len(run.arms) > 1
    rows, data = [], []
    for reward in run.training_rewards:
        for arm in run.arms:
            own, other = found.scores[arm, reward], found.scores[run.reference, reward]
            intervals = dict(zip((f"gain {SUITE}", f"gain {UNSEEN}"), _gains(own, arm in single), strict=True))
            if others:
                fixed = (arm in single, run.reference in single)
                pair = (NOTHING, NOTHING) if arm == run.reference else _differences(own, other, fixed)
                intervals |= {f"difference {SUITE}": pair[0], f"difference {UNSEEN}": pair[1]}
            size = f"{len(own.seeds)} × {own.prompts_scored}"
            shown = [f.estimate(interval) for interval in intervals.values()]
            rows.append((arm_name(run, arm), f.markdown(reward), *shown, size))
            record: dict[str, object] = {"arm": arm, "training_reward": reward}
            for name, interval in intervals.items():
                record |= bounds(name, interval)
            data.append(record | {"n": len(own.seeds), "prompts": own.prompts_scored})
    headers = ["method", "training reward", f"gain (base SD), {SUITE}", f"gain, {UNSEEN}"]
    headers += [f"difference to {f.markdown(run.reference)}, {SUITE}", f"difference, {UNSEEN}"] * others
    note = (
        "This suite: t over seed means. Unseen prompts: the held-out prompts taken as a sample of such prompts, seeds "
        "and prompts both random (crossed analysis of variance, Satterthwaite). Intervals are not adjusted."
    )
    if single:
        names = f.joined([f.markdown(arm) for arm in single])
        note += f" One instance each: {names}; for unseen prompts this instance on other prompts, t over prompts."
    headers.append("seeds × prompts")
    return Table("table-unseen-prompts", tuple(headers), tuple(rows), pd.DataFrame(data), note + inference_note(run))


def _gains(scores: SeedScores, instance: bool) -> tuple[Interval, Interval]:
    """For this suite, and for unseen prompts: over the prompts of one instance, else over seeds and prompts."""
    if not len(scores.seeds):
        return NOTHING, NOTHING
    return seed_t(scores.means), seed_t(scores.cells[0]) if instance else crossed(scores.cells)


def _differences(own: SeedScores, other: SeedScores, fixed: tuple[bool, bool]) -> tuple[Interval, Interval]:
    """Own minus other; what is one instance shifts the other's scores, picture by picture."""
    if not len(own.seeds) or not len(other.seeds):
        return NOTHING, NOTHING
    if fixed[1]:
        return _gains(less(own, other), fixed[0])
    if fixed[0]:
        turned = less(other, own)
        return _gains(SeedScores(-turned.values, turned.seeds, turned.prompts, turned.pictures), False)
    (a, b), _ = complete([own, other])
    suite = welch(a.mean(axis=(1, 2)), b.mean(axis=(1, 2))).interval
    return suite, crossed_difference(a.mean(axis=2), b.mean(axis=2))
