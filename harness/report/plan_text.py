"""A plan in words and aligned columns, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from harness.report import formatting as f
from harness.report.planning import Design, Plan, Question


def describe(plan: Plan) -> str:
    """Seeds needed, what the earlier run could have found, what more of each would do, and what it would cost."""
    design = plan.design
    lines = [
        f"{plan.run.name}: what it takes to detect a difference of {plan.difference:g} base SD with 80 % power",
        f"Variances from {_size(design)}, on held-out prompts. Holm: at the level of its first step, .05 / family.",
        *plan.left_out,
    ]
    for unseen in (False, True):
        lines += ["", TARGETS[unseen], *_seeds(plan, unseen)]
    lines += ["", "Assured: with spreads over seeds raised so that 80 of 100 pilots of this size reach the true ones."]
    lines += ["", "Smallest difference found, Holm, if the design had more of one thing", *_more(plan)]
    lines += ["", "Cost", *_costs(plan)]
    return "\n".join(lines)


TARGETS = {
    False: "This prompt suite: seeds per arm",
    True: "Unseen prompts, of which these are a sample: seeds per arm with as many prompts and latents",
}


def _seeds(plan: Plan, unseen: bool) -> list[str]:
    header = ["comparison", "trained on", "family", f"found by {plan.design.seeds} seeds", "at .05", "Holm"]
    rows = [[*header, "assured, .05", "assured, Holm"]]
    for question in plan.questions:
        needed = [
            _number(question.seeds(plan.difference, plan.design, unseen=unseen, holm=holm, assured=assured))
            for assured in (False, True)
            for holm in (False, True)
        ]
        found = f.significant(question.detectable(plan.design, unseen=unseen), 2)
        rows.append([question.name, question.reward, str(question.family), found, *needed])
    lines = _columns(rows)
    if any(NONE in row for row in rows):
        lines.append(f"{NONE}: no number of seeds finds it; see the cheapest design below, perhaps with more prompts.")
    return lines


NONE = "none"


def _number(seeds: int | None) -> str:
    return NONE if seeds is None else str(seeds)


def _more(plan: Plan) -> list[str]:
    now = plan.design
    designs = {
        "as it was": now,
        "2 x seeds": now.times(seeds=2),
        "2 x prompts": now.times(prompts=2),
        "2 x latents": now.times(latents=2),
    }
    rows = [["comparison", "trained on", "target", *designs]]
    for question in plan.questions:
        for unseen in (False, True):
            target = "unseen prompts" if unseen else "this suite"
            rows.append([question.name, question.reward, target, *_found(question, list(designs.values()), unseen)])
    rows.append(["worker hours", "", "", *(_hours(plan.hours(design)) for design in designs.values())])
    rows.append(["held-out pictures", "", "", *(_pictures(plan, design) for design in designs.values())])
    return _columns(rows)


def _found(question: Question, designs: Sequence[Design], unseen: bool) -> list[str]:
    return [f.significant(question.detectable(design, unseen=unseen), 2) for design in designs]


def _pictures(plan: Plan, design: Design) -> str:
    return f.count(sum(design.seeds if cost.seeded else 1 for cost in plan.costs) * design.pictures)


def _costs(plan: Plan) -> list[str]:
    machine = plan.run.provenance.get("cpu", "unknown")
    accelerator = plan.run.provenance.get("accelerator", "none")
    where = machine if accelerator in ("none", "") else accelerator
    each = {cost.arm: cost.seconds for cost in plan.costs}
    spent = f.joined([f"{arm} {f.significant(seconds, 2)} s" for arm, seconds in each.items()])
    lines = [f"A cell took, training and evaluation, on one worker of {where}: {spent}."]
    for unseen in (False, True):
        target = "Unseen prompts" if unseen else "This suite"
        lines.append(f"{target}: {_way(plan, unseen)}")
    return lines


def _way(plan: Plan, unseen: bool) -> str:
    """More seeds alone, and the cheapest design where that is another one."""
    now, seeds, best = plan.design, plan.seeds(plan.design, unseen=unseen), plan.cheapest(unseen=unseen)
    if best is None:
        return (
            "no design of up to four times as many prompts and latents finds it in every comparison; "
            "ask for a larger difference, or take a suite with many more prompts."
        )
    alone = "more seeds alone do not answer all comparisons"
    if seeds is not None and seeds <= now.seeds:
        return f"{_size(now)}, as they were, answer all comparisons."
    if seeds is not None:
        design = Design(seeds, now.prompts, now.latents)
        cells = sum((seeds - now.seeds) for cost in plan.costs if cost.seeded)
        alone = f"--seeds {seeds} for all comparisons, {cells} cells more ({_hours(plan.hours(design))} h in all)"
        if best == design:
            return f"{alone}; no cheaper design was found."
    return f"{alone}; cheapest: {_size(best)} ({_hours(plan.hours(best))} h), in a new run."


def _size(design: Design) -> str:
    pictures = f"{f.plural(design.prompts, 'prompt')} x {f.plural(design.latents, 'latent')}"
    return f"{f.plural(design.seeds, 'seed')}, {pictures}"


def _hours(hours: float) -> str:
    return f.significant(hours, 2) if math.isfinite(hours) else "unknown"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Texts to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [all(_is_number(text) for text in column[1:]) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


def _is_number(text: str) -> bool:
    return text in (NONE, f.DASH, "unknown") or text[:1] in tuple("0123456789−")
