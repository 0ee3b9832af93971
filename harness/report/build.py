"""`build_report`: a report as a pure function of a run directory."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from harness.report import account, findings, gradient_tables, mixes, narrative, regression, speed, tables, uses, watch
from harness.report import formatting as f
from harness.report.analysis import Analysis, analyse
from harness.report.captions import Drawn
from harness.report.figures import Figures, draw
from harness.report.folder import REPORT, replacing
from harness.report.page.write import write_page
from harness.report.records import load_run
from harness.report.style import drawing
from harness.report.tables import Table
from harness.report.unseen import unseen_prompts
from harness.report.variance import smallest_detectable
from harness.report.writing import LARGE, figure_writer, write_csv

TEMPLATES = Path(__file__).parent / "templates"


def build_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write `report.md` and `report.html` with figures and tables, in the place of an older report.

    The same records give the same bytes: no clock, no absolute path, no random number enters. `report.html` has the
    path from the report to the run's pictures, and so depends on where the one lies from the other; the text links
    cells to their records where the report lies in the run's directory.

    Args:
        run_dir: The run's directory, complete or partial.
        out: Where the report's files go; `run_dir/report` unless told.

    Returns:
        Path of `report.md`.

    Raises:
        UserError: if `run_dir` holds no run of this schema, or `out` has other files and no report.
    """
    target = out if out is not None else run_dir / "report"
    with replacing(target) as folder:
        _write(analyse(load_run(run_dir)), folder)
    return target / REPORT


def _write(analysis: Analysis, folder: Path) -> None:
    with figure_writer(folder, beside=len(analysis.run.cells) >= LARGE) as write:
        with drawing():
            figures = draw(analysis, write)
        content = _content(analysis, figures, _run_beside(analysis.run.folder, folder))
        for table in _tables_in(content):
            write_csv(table.data, folder / f"{table.name}.csv")
        text = tidy(environment().get_template("report.md.j2").render(content))
        (folder / REPORT).write_text(text, encoding="utf-8")
    write_page(analysis, text, folder)


def _run_beside(run: Path, folder: Path) -> str:
    """Address of the run's directory in links of its report; empty for a report that lies elsewhere."""
    inside = folder.resolve().is_relative_to(run.resolve())
    return Path(os.path.relpath(run.resolve(), folder.resolve())).as_posix() if inside else ""


def _content(analysis: Analysis, figures: Figures, beside: str) -> dict[str, Any]:
    """Everything that the template shows; ``beside``: address of the run's directory, or empty."""
    run = analysis.run
    scored = [reward for reward in run.training_rewards if reward in analysis.rewards]
    sections = [
        {
            "title": f"{run.relation.capitalize()} {f.markdown(reward)}",
            "results": tables.rewards_by_method(analysis, reward),
            "pairs": tables.pairwise(analysis, reward),
        }
        for reward in scored
    ]
    every = [judgement for found in analysis.secondary.values() for judgement in found]
    watched = watch.section(analysis)
    return {
        "title": f.markdown(_title(analysis)),
        "scope": narrative.scope(analysis),
        "incomplete": narrative.completeness(run),
        "partial": any(not cell.counts for cell in run.cells) or not run.base.counts,
        "lead": narrative.lead(analysis),
        "verdicts": narrative.verdicts(analysis),
        "detectable": smallest_detectable(analysis),
        "outcomes_lead": "Against the base model, on the same prompts and latents:",
        "outcomes": narrative.outcomes(analysis),
        "warnings": [*narrative.warnings(analysis), *watched["marks"]],
        "watch": watched,
        "pictures": figures.pictures,
        "samples": figures.pictures[1:],  # the first stands at the top: people look at pictures before tables
        "headline": tables.headline(analysis),
        "prices": tables.prices(analysis),
        "differences": figures.differences,
        "probabilities": figures.probabilities,
        "profile": figures.profile,
        "speed": speed.speed(analysis),
        "comparisons": tables.comparisons(analysis),
        "reference": f.markdown(run.reference),
        "forest": figures.forest,
        "how_to_read": narrative.how_to_read(analysis),
        "sections": sections,
        "claims": [vars(section) for section in findings.sections(analysis)],
        "unseen": unseen_prompts(analysis),
        "variance": figures.variance,
        "own_sampler": uses.own_sampler(analysis),
        "variants": uses.variants(analysis),
        "mixes": mixes.mixes_table(analysis, run.mixed, run.mixes) if run.mixes else None,
        "partings": uses.partings(analysis),
        "gradients": figures.gradients,
        "gradient_norms": _probe_table(analysis, "gradient-norms"),
        "gradient_variance": _probe_table(analysis, "gradient-variance"),
        "curves": figures.curves,
        "matrix": figures.matrix,
        "generalisation": tables.generalisation(analysis),
        "matrices": [(f.markdown(arm), tables.matrix_table(analysis, arm)) for arm in run.arms],
        "over_optimisation": narrative.over_optimisation(analysis),
        "diversity": narrative.diversity(analysis),
        "tradeoffs": figures.tradeoffs,
        "costs": account.costs(analysis),
        "generation": account.generation(analysis),
        "regression": regression.regression(run),
        "arms": _arms(analysis),
        "settings": account.settings(run),
        "glossary": account.glossary(analysis),
        "threats": narrative.threats(analysis),
        "provenance": account.provenance(run),
        "inventory": account.inventory(run),
        "cells": account.cells(run, beside),
        "raw": tables.raw_p([*analysis.primary, *every]),
    }


def _probe_table(analysis: Analysis, probe: str) -> Table | None:
    """What a probe measured on the first training reward; None where it did not run."""
    run = analysis.run
    if not len(run.probes) or not (run.probes["probe"] == probe).any():
        return None
    make = gradient_tables.norms_table if probe == "gradient-norms" else gradient_tables.variance_table
    return make(run.probes, run.arms, run.training_rewards[0], f"table-{probe}")


def _title(analysis: Analysis) -> str:
    run = analysis.run
    rewards = f.joined(list(run.training_rewards))
    arms = " vs ".join(run.arms) if len(run.arms) <= 3 else f"{len(run.arms)} methods"
    return f"{arms} on {rewards}"


def _arms(analysis: Analysis) -> list[dict[str, object]]:
    result = []
    for arm, table in zip(analysis.run.plan["arms"], account.hyperparameters(analysis.run), strict=True):
        number = sum(row[-1] != "default" for row in table.rows)
        gradient = "uses" if arm.get("needs_reward_gradient") else "does not use"
        method, version = arm.get("method", "unknown"), arm.get("version", "unknown")
        changes = " Changes no weights; spends on each picture." if arm["label"] in analysis.run.inference else ""
        if arm["label"] in analysis.run.given:
            changes = " Made elsewhere."
        about = f"Method {method}, version {version}; {gradient} reward gradients.{changes}"
        result.append(
            {
                "label": f.markdown(arm["label"]),
                "description": f"{f.markdown(arm.get('description', ''))} {f.markdown(about)}".strip(),
                "summary": f"{f.plural(len(table.rows), 'hyper-parameter')}, {number} set by the preset or the user",
                "table": table,
            }
        )
    return result


def _tables_in(content: dict[str, Any]) -> list[Table]:
    """Every table with a name, wherever it stands."""
    found: dict[str, Table] = {}

    def visit(value: object) -> None:
        if isinstance(value, Table) and value.name:
            found[value.name] = value
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(content)
    return [found[name] for name in sorted(found)]


def environment() -> jinja2.Environment:
    """Templates of Markdown, with filters for figures, tables and lists; texts are escaped where they are made."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=False, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made.filters["figure"] = _figure_text
    made.filters["table"] = _table_text
    made.filters["bullets"] = _bullets
    return made


def _figure_text(figure: Drawn) -> str:
    """Picture, title, caption and the files behind it."""
    alt = html.escape(" ".join(figure.alt.split()), quote=True)
    files = [f"{figure.name}.csv"] + [f"{figure.name}.svg"] * figure.vector
    links = " · ".join(f"[{file}]({file})" for file in files)
    image = f'<img src="{figure.name}.png" width="{figure.width}" alt="{alt}">'
    return f"{image}\n\n**{f.markdown(figure.title)}.** {f.markdown(figure.caption)} Data: {links}"


def _table_text(table: Table) -> str:
    """The table, its note and its file."""
    data = f"Data: [{table.name}.csv]({table.name}.csv)" if table.name else ""
    return f"{table.markdown}\n\n{' '.join(part for part in (table.note, data) if part)}"


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def tidy(text: str) -> str:
    """At most one empty line in a row, one newline at the end."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"
