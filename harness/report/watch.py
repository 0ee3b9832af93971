"""The over-optimisation watch and how pictures look, from the records: what was warned of while training is not read.

A cell is watched by `harness.watching`, as while it was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from harness.metrics.appearance import AXES
from harness.report import formatting as f
from harness.report.analysis import Analysis
from harness.report.records import BASE, DEFAULT_VARIANT, FINAL, HELD_OUT, Cell, Run, weights
from harness.report.tables import Table, arm_name
from harness.stats.intervals import seed_t
from harness.stats.seed_means import Array
from harness.stats.watch import LEVEL
from harness.watching import DIVERSITY, END, START, CellWatch, Rows, Warned, watch_rows

DRIFT = "drift_latent_rms"
WARNING_COLUMNS = (
    *("arm", "training_reward", "seed", "point", "witness", "since", "fall", "standard_error", "base"),
    *("rise", "statistic", "critical", "prompts"),
)
LONG = 24  # rows of a table that are shown without being asked for


@dataclass(frozen=True, eq=False)
class Watch:
    """The watch of all trained cells of a run.

    Attributes:
        seen: Each watched cell; those without scores are not among them.
    """

    run: Run
    seen: tuple[tuple[Cell, CellWatch], ...]

    @cached_property
    def groups(self) -> dict[tuple[str, str], list[tuple[Cell, CellWatch]]]:
        """Watched cells by arm and training reward, in the order of the run."""
        found: dict[tuple[str, str], list[tuple[Cell, CellWatch]]] = {}
        for cell, seen in self.seen:
            found.setdefault((cell.arm, cell.reward), []).append((cell, seen))
        return found

    def warned(self, arm: str, reward: str) -> list[tuple[Cell, CellWatch]]:
        """Those of a group with a warning, by seed."""
        return [(cell, seen) for cell, seen in self.groups.get((arm, reward), []) if seen.warnings]

    def beyond_chance(self, arm: str, reward: str) -> bool:
        """Whether more seeds are warned of than false alarms of 5 % explain (binomial, at most 5 %)."""
        cells, warned = self.groups.get((arm, reward), []), len(self.warned(arm, reward))
        return bool(warned and stats.binom.sf(warned - 1, len(cells), LEVEL) <= LEVEL + 1e-12)


def watch_run(run: Run) -> Watch:
    """Watch every trained cell that has scores."""
    kept = (run.scores["variant"] == DEFAULT_VARIANT) & (run.scores["split"] == HELD_OUT)
    scores = run.scores.loc[kept, ["cell", "arm", "point", "prompt_id", "noise_id", "reward", "score"]]
    metrics = run.metrics[run.metrics["variant"] == DEFAULT_VARIANT]
    base = Rows.of_scores(scores[scores["arm"] == BASE])
    base_metrics = Rows.of_metrics(metrics[(metrics["arm"] == BASE) & (metrics["point"] == START)])
    by_cell = _by_cell(Rows.of_scores(scores), scores["cell"])
    measured = _by_cell(Rows.of_metrics(metrics), metrics["cell"])
    nothing = Rows.of_metrics(metrics.iloc[:0])
    roles = {info.name: info.role for info in run.rewards}
    found = []
    for cell in run.cells:
        if cell.arm in run.untrained or cell.name not in by_cell or not len(base.score):
            continue
        rows = by_cell[cell.name]
        seen = watch_rows(
            rows,
            measured.get(cell.name, nothing),
            base,
            base_metrics,
            training_reward=cell.reward,
            terms=weights(cell.reward) or {cell.reward: 1.0},
            roles=roles,
            latents=_latents(run, rows),
            looks=_looks(run),
        )
        found.append((cell, seen))
    return Watch(run, tuple(found))


def _by_cell(rows: Rows, cells: pd.Series) -> dict[str, Rows]:
    """The rows of each cell."""
    codes, names = pd.factorize(cells)
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=len(names))
    ends = np.cumsum(counts)
    parts = zip(names, (ends - counts).tolist(), ends.tolist(), strict=True)
    return {str(name): rows.part(order[start:end]) for name, start, end in parts}


def _latents(run: Run, rows: Rows) -> int:
    """Pictures per prompt at curve points: by the plan, or else those that there are."""
    planned = run.plan.get("config", {}).get("evaluation", {}).get("curve_latents")
    if planned is not None:
        return int(planned)
    along = rows.along.noise
    return int((along if len(along) else rows.noise).max()) + 1


def _looks(run: Run) -> int:
    budget = run.plan.get("budget", {})
    amount = float(budget.get("amount", np.inf))
    return 1 + sum(float(point) < amount for point in budget.get("curve_points", []))


def lead(watch: Watch) -> list[str]:
    """What was watched, by what rule, and what could not be seen."""
    if not watch.seen:
        return ["Not watched: no trained cell and the base model have scores on the same held-out prompts."]
    every = [seen for _, seen in watch.seen]
    warned = sum(bool(seen.warnings) for seen in every)
    prompts = max((w.found.prompts for seen in every for w in seen.warnings), default=0)
    counted = f" ({prompts} prompts)" if prompts else ""
    told = [
        f"Warned of in {warned} of {f.plural(len(every), 'training')}. A warning means that a witness (the held-out "
        "measure of the training reward, another held-out reward, a gold metric, or the diversity within prompts) fell "
        f"from an earlier point of the same training beyond the noise of the prompts{counted} while the training "
        f"reward rose. Where nothing falls, at most {LEVEL:.0%} of trainings are warned of, over all points and "
        "witnesses together; a flag means more seeds than such false alarms explain.".replace("%", " %")
    ]
    told += [_unrecorded(every)] if any(seen.unrecorded for seen in every) else []
    blind = sum(bool(np.isinf(seen.result.critical).all()) for seen in every)
    if blind:
        told.append(f"In {f.plural(blind, 'training')} no data could have warned: too few prompts.")
    if all(not seen.result.witnesses for seen in every):
        told.append("No witness was scored: over-optimisation could not have been seen.")
    return told


def _unrecorded(every: Sequence[CellWatch]) -> str:
    counts: dict[str, int] = {}
    for seen in every:
        for name in seen.unrecorded:
            counts[name] = counts.get(name, 0) + 1
    parts = [
        f"{f.markdown('diversity' if name == DIVERSITY else name)} ({number} of {len(every)})"
        for name, number in counts.items()
    ]
    return f"Not recorded at all points, so that a fall may be unseen: {f.joined(parts)}."


def marks(watch: Watch) -> list[str]:
    """One sentence for each training reward, naming the methods that are flagged."""
    result = []
    for reward in watch.run.training_rewards:
        flagged = []
        for arm in watch.run.arms:
            if watch.beyond_chance(arm, reward):
                warned, cells = watch.warned(arm, reward), watch.groups[arm, reward]
                first = min((seen.first_warnings[0].point for _, seen in warned), key=_order)
                seeds = f.plural(len(cells), "seed")
                flagged.append(f"{arm_name(watch.run, arm)} ({len(warned)} of {seeds}, first {_place(first)})")
        if flagged:
            result.append(
                f"**Over-optimisation watch**: while {f.markdown(reward)} rose, a held-out measure, gold metric or "
                f"diversity fell along training with {f.joined(flagged)}."
            )
    return result


def summary(watch: Watch) -> Table:
    """One row per arm and training reward."""
    rows, data = [], []
    for (arm, reward), cells in watch.groups.items():
        warned = watch.warned(arm, reward)
        counts: dict[str, int] = {}
        for _, seen in warned:
            for warning in seen.first_warnings:
                counts[warning.found.witness] = counts.get(warning.found.witness, 0) + 1
        first = [seen.first_warnings[0].point for _, seen in warned]
        flag = watch.beyond_chance(arm, reward)
        rows.append(
            (
                arm_name(watch.run, arm),
                f.markdown(reward),
                f"{len(warned)} of {len(cells)}" + (" ⚑" if flag else ""),
                _place(min(first, key=_order)) if first else f.DASH,
                f.joined([f"{_witness(name)} ({number})" for name, number in counts.items()]) or f.DASH,
            )
        )
        data.append(
            {"arm": arm, "training_reward": reward, "warned": len(warned), "watched": len(cells), "flag": flag}
            | {"first": min(first, key=_order) if first else ""}
        )
    headers = ("method", "trained on", "seeds warned", "first", "witnesses that fell (seeds)")
    return Table("table-watch", headers, tuple(rows), pd.DataFrame(data))


def every_warning(watch: Watch) -> Table:
    """One row per seed and witness: where it was first warned of."""
    rows, data = [], []
    for cell, seen in watch.seen:
        for warning in seen.first_warnings:
            found = warning.found
            rows.append(
                (
                    arm_name(watch.run, cell.arm),
                    f.markdown(cell.reward),
                    str(cell.seed),
                    f"{_place(warning.point)}, since {_since(warning.since)}",
                    f.significant(found.rise, sign=True),
                    _witness(found.witness),
                    f"{f.significant(-found.fall, sign=True)} (SE {f.significant(found.standard_error, 2)})",
                    f.significant(warning.base),
                )
            )
            data.append(_record(cell, warning))
    headers = (
        *("method", "trained on", "seed", "first warning, and since when"),
        *("change of the training reward", "witness", "its change", "base"),
    )
    note = (
        "Changes are means over prompts, on the pictures that all points share, in the unit of the score. The earlier "
        "point is the witness's best: a fall from it is a little too large on average."
    )
    return Table("table-watch-every", headers, tuple(rows), pd.DataFrame(data, columns=list(WARNING_COLUMNS)), note)


def _record(cell: Cell, warning: Warned) -> dict[str, object]:
    numbers = {"arm": cell.arm, "seed": cell.seed, "base": warning.base, **warning.numbers}
    return {name: numbers[name] for name in WARNING_COLUMNS}


def _witness(name: str) -> str:
    return "diversity (pairwise distance)" if name == DIVERSITY else f.markdown(name)


def _place(point: str) -> str:
    return "at the end" if point == END else f"at {f.count(float(point))}"


def _since(point: str) -> str:
    return "base model" if point == START else f.count(float(point))


def _order(point: str) -> float:
    return float("inf") if point == END else float(point)


def appearance(analysis: Analysis) -> Table | None:
    """Axes that no reward sees, at the end: the base model's values, and each arm's change on the same prompts.

    None where the base model's were not recorded.
    """
    run = analysis.run
    means = _prompt_means(run)
    base = means.get(run.base.name, pd.DataFrame())
    names = [name for name in AXES if name in base]
    if not names:
        return None
    rows: list[tuple[str, ...]] = [
        ("base model", f.DASH, *(f.significant(float(base[name].mean())) for name in names), "0")
    ]
    data: list[dict[str, object]] = [
        {"arm": BASE, "training_reward": "", "metric": name, "estimate": float(base[name].mean())} for name in names
    ]
    lacking = 0
    for arm in run.arms:
        for reward in run.training_rewards:
            cells = [cell for cell in run.cells_of(arm, reward) if cell.counts]
            if not cells:
                continue
            lacking += sum(names[0] not in means.get(cell.name, pd.DataFrame()) for cell in cells)
            texts = []
            for name in [*names, DRIFT]:
                interval = seed_t(_changes(cells, means, base, name))
                texts.append(f.estimate(interval, sign=name != DRIFT) if interval.n else "not recorded")
                data.append(
                    {"arm": arm, "training_reward": reward, "metric": name, "estimate": interval.estimate}
                    | {"low": interval.low, "high": interval.high, "seeds": interval.n}
                )
            rows.append((arm_name(run, arm), f.markdown(reward), *texts))
    about = [f"*{name.replace('_', ' ')}*: {meaning}" for name, meaning in AXES.items()]
    note = (
        "Change from the base model on the same held-out prompts and latents, mean over training seeds with 95 % t "
        "interval; drift is the root mean square difference of latents. Exploratory: nothing here is a test. "
        f"{f.joined(about)}."
    )
    note += f" Not recorded for {f.plural(lacking, 'cell')}." if lacking else ""
    headers = ("method", "trained on", *(name.replace("_", " ") for name in names), "drift")
    return Table("table-appearance", headers, tuple(rows), pd.DataFrame(data), note)


def _prompt_means(run: Run) -> dict[str, pd.DataFrame]:
    """Final values by prompt and metric of every cell, held-out prompts only."""
    table, prompts = run.metrics, set(run.prompts(HELD_OUT))
    kept = table[(table["point"] == FINAL) & (table["variant"] == DEFAULT_VARIANT)]
    kept = kept[kept["metric"].isin([*AXES, DRIFT]) & kept["prompt_id"].isin(prompts)]
    plain = kept.astype({"metric": str, "prompt_id": str, "cell": str})
    wide = plain.pivot_table(index=["cell", "prompt_id"], columns="metric", values="value")
    return {str(cell): rows.droplevel("cell").dropna(axis=1, how="all") for cell, rows in wide.groupby(level="cell")}


def _changes(cells: Iterable[Cell], means: dict[str, pd.DataFrame], base: pd.DataFrame, name: str) -> Array:
    """(S,) mean over prompts of value minus the base model's, or of the drift itself; NaN where not recorded."""
    found = []
    for cell in cells:
        mine = means.get(cell.name, pd.DataFrame())
        if name not in mine:
            found.append(np.nan)
            continue
        change = mine[name] if name == DRIFT else (mine[name] - base[name])
        found.append(float(change.mean()))
    return np.asarray(found, dtype=np.float64)


def section(analysis: Analysis) -> dict[str, Any]:
    """What the report shows of it."""
    watch = watch_run(analysis.run)
    every = every_warning(watch)
    return {
        "lead": lead(watch),
        "marks": marks(watch),
        "summary": summary(watch) if watch.seen else None,
        "every": every if every.rows else None,
        "long": len(every.rows) > LONG,
        "appearance": appearance(analysis),
    }
