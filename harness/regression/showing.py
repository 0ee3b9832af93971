"""A comparison as text: lines for a terminal, and a comment in Markdown for a pull request."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.regression.comparing import Comparison, new_to_baseline, unbumped
from harness.regression.costs import FACTOR, CostRow
from harness.regression.gating import ALPHA, ROUNDING, Family, Row
from harness.report import formatting as f
from harness.report.records import BASE
from harness.stats.gate import GateOutcome

COLUMNS = (
    "method",
    "trained on",
    "judged by",
    "baseline",
    "new",
    "difference [90 %]",
    "p",
    "outcome",
    "how",
    "pictures",
)
COST_COLUMNS = ("method", "cost", "baseline", "new", "ratio [95 %]", "")
TITLES = {
    Family.POOLED: "Gain on what was trained on, mean over training rewards (base SD)",
    Family.CELL: "Each method and reward that decides (base SD)",
    Family.WATCHED: "Other rewards, which decide nothing (base SD); identical ones are left out",
}
MEANING = {
    GateOutcome.IDENTICAL: "all records are the same",
    GateOutcome.EQUIVALENT: "every difference is inside the margin",
    GateOutcome.IMPROVED: "nothing is worse, something is better",
    GateOutcome.NOT_WORSE: "no loss as large as the margin",
    GateOutcome.WORSE: "a loss larger than the margin",
    GateOutcome.INCONCLUSIVE: "a loss as large as the margin is not excluded",
}


def terminal(comparison: Comparison) -> list[str]:
    """Lines of a table in plain text."""
    lines = [headline(comparison), ""]
    for family in Family:
        rows = _shown(comparison, family)
        if rows:
            lines += [TITLES[family], *_aligned([COLUMNS, *map(_cells, rows)]), ""]
    if comparison.costs:
        lines += [COSTS_TITLE, *_aligned([COST_COLUMNS, *map(_cost_cells, comparison.costs)]), ""]
    for title, items in _lists(comparison):
        lines += [f"{title}:", *(f"  {item}" for item in items), ""]
    return lines[:-1]


def markdown(comparison: Comparison) -> str:
    """A comment for a pull request: what decides at the top, the rest folded."""
    parts = [f"### {_bold(comparison)}"]
    for family in (Family.POOLED, Family.CELL):
        rows = _shown(comparison, family)
        if rows:
            parts.append(f"{TITLES[family]}:\n\n{_table(COLUMNS, [_cells(row) for row in rows])}")
    for title, items in _lists(comparison):
        parts.append(f"**{title}**\n\n" + "\n".join(f"- {f.markdown(item)}" for item in items))
    watched = _shown(comparison, Family.WATCHED)
    if watched:
        parts.append(_folded(TITLES[Family.WATCHED], _table(COLUMNS, [_cells(row) for row in watched])))
    if comparison.costs:
        parts.append(_folded(COSTS_TITLE, _table(COST_COLUMNS, [_cost_cells(row) for row in comparison.costs])))
    parts.append(_folded("How to read this", "\n".join(f"- {f.markdown(line)}" for line in reading(comparison))))
    return "\n\n".join(parts) + "\n"


COSTS_TITLE = f"Costs, new over baseline (flagged from {FACTOR:g} on and beyond noise; never fail a comparison)"


def headline(comparison: Comparison) -> str:
    """One sentence with the outcome of the whole."""
    outcome = comparison.outcome
    text = f"{comparison.new.name} against {comparison.baseline.name}: {outcome}, {MEANING[outcome]}"
    return text + (" of what could be compared." if comparison.missing else ".")


def _bold(comparison: Comparison) -> str:
    outcome = comparison.outcome
    return f.markdown(headline(comparison)).replace(f": {outcome},", f": **{outcome}**,", 1)


def reading(comparison: Comparison) -> list[str]:
    """What the columns mean."""
    margin = (
        f"Margin: a loss of {comparison.margin:g} base SD, the spread of the base model's pictures within a prompt, as "
        "stored in the baseline. Differences are new minus baseline, gains over the base model on held-out prompts."
    )
    outcomes = (
        "WORSE: the whole 90 % interval is below the margin, and Holm's p over the rows of the table is below "
        f"{ALPHA:g}. Inconclusive: the interval crosses the margin. Not worse: it lies above it. Improved: it lies "
        "above zero. Equivalent: inside the margin on both sides. Identical: all records are equal, no test."
    )
    seeds = (
        "Paired: by training seed, on the same prompts and latents. Welch: the runs have other seeds, which are then "
        "independent samples and need many more of them."
    )
    pictures = f"Pictures: whether each score equals the stored one within {ROUNDING:g}, on the same platform only."
    return [margin, outcomes, seeds, pictures]


def advice(comparison: Comparison) -> list[str]:
    """What to do, if anything."""
    todo = [
        f"{method}: its numbers changed, its version did not; raise `version` in its file, so that reports tell them "
        "apart"
        for method in unbumped(comparison)
    ]
    if comparison.outcome is GateOutcome.WORSE:
        todo.append(
            "If the loss is accepted, save a new baseline: "
            f"python -m harness baseline save RUN {comparison.baseline.name} --force"
        )
    rows = [row for row in comparison.deciding if row.outcome is GateOutcome.INCONCLUSIVE]
    needed = [row.needed for row in rows if row.needed]
    if needed:
        todo.append(f"For an answer, if nothing has changed: {max(needed)} seeds in both, or a larger margin")
    elif rows:
        todo.append("For an answer: more seeds in both (at least two)")
    small = [row for row in comparison.deciding if row.arm != BASE and abs(row.baseline) < comparison.margin]
    todo += [
        f"{row.arm} on {row.reward}: gained {f.significant(row.baseline, sign=True)} base SD in the baseline, less "
        "than the margin; losing all of it would pass: train for longer, or take a smaller margin"
        for row in small
    ]
    todo += [f"{arm}: has no baseline; it enters with the next one" for arm in new_to_baseline(comparison)]
    return todo


def _lists(comparison: Comparison) -> list[tuple[str, Sequence[str]]]:
    slower = [
        f"{row.arm}: {row.cost} {f.significant(row.ratio)} times the baseline's {_bracket(row)}"
        for row in comparison.slower
    ]
    sides = [
        f"{what}: {side.run}, data until {side.until}, commit {side.git['commit']}"
        + (" with uncommitted changes" if side.git["dirty"] is True else "")
        + f", `{side.command}`"
        for what, side in (("new", comparison.new), ("baseline", comparison.baseline))
    ]
    found = (
        ("Not compared", comparison.missing),
        ("Dearer", slower),
        ("Changed besides results", comparison.changes),
        ("What to do", advice(comparison)),
        ("From", sides),
    )
    return [(title, items) for title, items in found if items]


def _shown(comparison: Comparison, family: Family) -> list[Row]:
    """Rows of a table; of those that decide nothing only what has changed."""
    rows = [row for row in comparison.rows if row.family is family]
    return [row for row in rows if family is not Family.WATCHED or row.outcome is not GateOutcome.IDENTICAL]


def _cells(row: Row) -> tuple[str, ...]:
    where = "base model" if row.arm == BASE else row.arm
    how = f"{row.how}; {row.note}" if row.note else row.how
    outcome = f"{row.outcome} ({row.needed} seeds needed)" if row.needed else str(row.outcome)
    return (
        *(where, row.training_reward or f.DASH, row.reward),
        *(f.significant(row.baseline, sign=True), f.significant(row.new, sign=True)),
        *(_difference(row), f.p_value(row.adjusted_p), outcome, how, row.golden or f.DASH),
    )


def _difference(row: Row) -> str:
    """With its interval where there is one; without seed variance, the number alone."""
    if math.isfinite(row.difference.half_width) and row.difference.df > 0:
        return f.estimate(row.difference)
    return f.significant(row.difference.estimate, sign=True)


def _cost_cells(row: CostRow) -> tuple[str, ...]:
    bounds = f" {_bracket(row)}" if math.isfinite(row.high) and row.low < row.high else ""
    remark = "dearer" if row.flagged else row.note
    return (
        *(
            row.arm,
            row.cost.replace("_", " ").replace("mib", "MiB"),
            f.significant(row.baseline),
            f.significant(row.new),
        ),
        *(f.significant(row.ratio) + bounds, remark),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *([f.markdown(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{f.markdown(title)}</summary>\n\n{body}\n\n</details>"


def _bracket(row: CostRow) -> str:
    return f"[{f.significant(row.low)}, {f.significant(row.high)}]"
