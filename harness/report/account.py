"""Tables about the run itself: costs, inventory, hyper-parameters, rewards, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from harness.report import formatting as f
from harness.report.analysis import Analysis
from harness.report.flops import training_flops, uncounted
from harness.report.records import Cell, Run
from harness.report.tables import Table, arm_name, inference_note
from harness.stats.intervals import clopper_pearson

ROWS = ("forward_rows", "gradient_rows", "recomputed_rows", "backward_rows")
NOT_MEASURED = "not measured"
TIMES = ("iterations", "train_seconds", "evaluate_seconds", "peak_memory_mib", "seconds_per_query")
COSTS = ("queries", "reward_gradients", *ROWS, "decodes")
PICTURE = ("queries", "denoiser_rows")
STATES = ("completed", "diverged", "crashed", "running", "planned")
UNKNOWN = "unknown"
EXPECTED = ("git", "packages", "cpu", "command")


def costs(analysis: Analysis) -> Table:
    """T5: what a cell of each method spent on training, and what each picture takes that it generates."""
    headers = (
        *("method", "reward queries (with gradient)", "denoiser rows"),
        *("forward / with gradient / recomputed / backward", "decodes", "TFLOPs"),
        *("training time (s)", "seconds a query, alone", "peak memory (MiB)"),
    )
    records = []
    for cell in analysis.run.cells:
        if cell.counts:
            spent = {name: _number(cell.status.get("cost", {}).get(name)) for name in COSTS}
            records.append(cost_row(cell) | {"tflops": training_flops(analysis.run, cell, spent) / 1e12})
    columns = ["cell", "arm", "training_reward", "seed", *COSTS, "tflops", *TIMES, *_pictures()]
    data = pd.DataFrame(records, columns=columns)
    rows = []
    for arm in analysis.run.arms:
        mine = data[data["arm"] == arm]
        mean = {name: float(mine[name].mean()) if len(mine) else float("nan") for name in (*COSTS, "tflops")}
        seconds = [float(x) for x in mine["train_seconds"]]
        alone = analysis.run.timing.get(arm, {})
        memory = [_number(alone["peak_memory_mib"])] if alone else [float(x) for x in mine["peak_memory_mib"]]
        rows.append(
            (
                arm_name(analysis.run, arm),
                f"{f.count(mean['queries'])} ({f.count(mean['reward_gradients'])})",
                f.count(sum(mean[name] for name in ROWS)),
                " / ".join(f.count(mean[name]) for name in ROWS),
                f.count(mean["decodes"]),
                f.significant(mean["tflops"]) if np.isfinite(mean["tflops"]) else NOT_MEASURED,
                f.spread(seconds),
                f.significant(_number(alone.get("seconds_per_query"))),
                f.spread(memory),
            )
        )
    note = (
        "Means over cells, training only (smallest–largest in parentheses). A query is one picture scored by one "
        "component reward; a denoiser row is one latent through the denoiser, guidance counting two. Training time is "
        "that of workers side by side. "
    )
    if analysis.run.flops:
        note += (
            "TFLOPs: 10¹² floating-point operations, counts times what each unit takes; matrix products, convolutions "
            "and attention are counted. "
        )
        if nothing := uncounted(analysis.run):
            note += f"Not counted, since they have no such operation: {f.joined([f.markdown(x) for x in nothing])}. "
    note += (
        "Seconds a query and peak memory: each method alone in a fresh process on the first training reward."
        if analysis.run.timing
        else "Peak memory is that of workers that ran other cells before."
    )
    note += inference_note(analysis.run)
    return Table("table-costs", headers, tuple(rows), data, note)


def generation(analysis: Analysis) -> Table:
    """T5, second part: what each picture takes that a method generates, training aside."""
    run = analysis.run
    headers = ("method", "queries a generated picture", "denoiser rows a generated picture", "seconds, alone")
    data = pd.DataFrame([cost_row(cell) for cell in run.cells if cell.counts], columns=["arm", *_pictures()])
    means = data.groupby("arm").mean()
    rows = []
    for arm in run.arms:
        spent = [float(means[name].get(arm, np.nan)) for name in _pictures()]
        alone = _number(run.timing.get(arm, {}).get("seconds_per_picture"))
        rows.append((arm_name(run, arm), *(f.significant(x) for x in (*spent, alone))))
    note = "Means over the pictures of the final evaluation, whose own scoring is not counted." + inference_note(run)
    return Table("table-generation", headers, tuple(rows), data, note)


def cost_row(cell: Cell) -> dict[str, object]:
    """One cell's meter as numbers; NaN where it was not recorded."""
    status = cell.status
    spent = {name: _number(status.get("cost", {}).get(name)) for name in COSTS}
    train = _number(status.get("seconds", {}).get("train"))
    return {
        "cell": cell.name,
        "arm": cell.arm,
        "training_reward": cell.reward,
        "seed": cell.seed,
        **spent,
        "iterations": _number(status.get("iterations")),
        "train_seconds": train,
        "evaluate_seconds": _number(status.get("seconds", {}).get("evaluate")),
        "peak_memory_mib": _number(status.get("peak_memory_mib")),
        "seconds_per_query": _ratio(train, spent["queries"]),
        **{
            name: _number(status.get("generation_cost", {}).get(kind))
            for name, kind in zip(_pictures(), PICTURE, strict=True)
        },
    }


def _pictures() -> tuple[str, ...]:
    return tuple(f"{name}_per_picture" for name in PICTURE)


def inventory(run: Run) -> Table:
    """T6: how many cells of each arm were planned and how they ended."""
    headers = (
        "method",
        "planned",
        "completed",
        "diverged",
        "crashed",
        "unfinished",
        "rate of divergence, 95 % interval",
    )
    rows, data = [], []
    for arm in run.arms:
        cells = [cell for cell in run.cells if cell.arm == arm]
        number = {state: sum(cell.state == state for cell in cells) for state in STATES}
        finished = number["completed"] + number["diverged"]
        rate = clopper_pearson(number["diverged"], finished)
        unfinished = len(cells) - finished - number["crashed"]
        text = f"{f.fixed(100 * rate.estimate, 0)} % [{f.fixed(100 * rate.low, 0)}, {f.fixed(100 * rate.high, 0)}]"
        counts = (len(cells), number["completed"], number["diverged"], number["crashed"], unfinished)
        rows.append((arm_name(run, arm), *map(str, counts), text if finished else f.DASH))
        data.append(dict(zip(("arm", *headers[1:6]), (arm, *counts), strict=True)))
    note = "Every planned cell is in this table. Diverged cells count in all results with their last finite checkpoint."
    note += inference_note(run)
    return Table("table-inventory", headers, tuple(rows), pd.DataFrame(data), note)


def cells(run: Run, beside: str) -> Table:
    """Appendix of T6: one row per cell, linked to its record where the run's directory has an address."""
    headers = ("cell", "state", "reason", "iterations", "training time (s)", "finished (UTC)")
    every = [run.base, *run.cells]
    rows = [
        (
            _linked(cell, beside),
            cell.state if cell.state != "planned" else "not started",
            f.markdown(cell.reason) or f.DASH,
            f.count(_number(cell.status.get("iterations"))),
            f.significant(_number(cell.status.get("seconds", {}).get("train"))),
            f.markdown(cell.status.get("finished") or f.DASH),
        )
        for cell in every
    ]
    data = pd.DataFrame([{"cell": c.name, "state": c.state, "reason": c.reason} for c in every])
    return Table("table-cells", headers, tuple(rows), data)


def _linked(cell: Cell, beside: str) -> str:
    name = f.markdown(cell.name)
    return f"[{name}]({quote(f'{beside}/cells/{cell.name}/status.json')})" if beside and cell.status else name


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    result: dict[str, Any] = {}
    for key in value:
        result |= flatten(value[key], f"{prefix}.{key}" if prefix else str(key))
    return result


def hyperparameters(run: Run) -> list[Table]:
    """T7: one table per arm; what is not the method's default is bold, and says where it comes from."""
    tables = []
    for i, arm in enumerate(run.plan["arms"]):
        method = arm.get("method", "")
        origins: dict[str, str] = {}
        for origin, values in (
            ("preset", run.plan.get("config", {}).get("settings", {}).get(method, {})),
            ("set", run.plan.get("passed", {}).get("settings", {}).get(method, {})),
            ("arm", arm.get("overrides", {})),
        ):
            # `learning_rate` is accepted for `optimizer.learning_rate`.
            origins |= {name: origin for key in flatten(values) for name in (key, f"optimizer.{key}")}
        known = flatten(arm.get("config", {}))
        extra = {key: value for key, value in flatten(arm.get("overrides", {})).items() if key.startswith("sampler.")}
        tables.append(_fields(f"table-parameters-{i + 1}", str(arm["label"]), known | extra, origins))
    return tables


def settings(run: Run) -> Table:
    """T7 for the run: everything that holds for all arms."""
    passed = dict.fromkeys(flatten(run.plan.get("passed", {})), "set")
    return _fields("table-settings", "run", flatten(run.plan.get("config", {})), passed)


def _fields(name: str, owner: str, values: Mapping[str, Any], origins: Mapping[str, str]) -> Table:
    keys = sorted(values)
    texts = {key: f.value_text(values[key]) for key in keys}
    rows = tuple(
        (
            f.markdown(key),
            f"**{f.markdown(texts[key])}**" if key in origins else f.markdown(texts[key]),
            origins.get(key, "default"),
        )
        for key in keys
    )
    data = [{"owner": owner, "field": key, "value": texts[key], "origin": origins.get(key, "default")} for key in keys]
    columns = ["owner", "field", "value", "origin"]
    return Table(name, ("field", "value", "origin"), rows, pd.DataFrame(data, columns=columns))


def glossary(analysis: Analysis) -> Table:
    """T8: what each evaluation reward measures."""
    headers = ("metric", "role", "unit", "differentiable", "version", "base mean", "base SD", "description")
    rows, data = [], []
    for info in analysis.run.rewards:
        scores = analysis.gains.base_scores(info.name, "held-out")
        mean = float(scores.means[0]) if len(scores.seeds) else float("nan")
        sd = analysis.gains.sd(info.name)
        trained = info.name in analysis.run.training_rewards
        role = (
            f"{info.role}, {'first judge' if analysis.run.relation == 'judged by' else 'trained on'}"
            if trained
            else info.role
        )
        rows.append(
            (
                f.markdown(info.name),
                role,
                f.markdown(info.unit),
                "yes" if info.differentiable else "no",
                f.markdown(info.version),
                f.significant(mean),
                f.significant(sd),
                f.markdown(info.description) or f.DASH,
            )
        )
        record = {"metric": info.name, "role": info.role, "unit": info.unit, "version": info.version}
        data.append(record | {"base_mean": mean, "base_sd": sd, "prompts": scores.prompts_scored})
    note = (
        "Larger is better for all. Proxy: may be trained on; held-out: another measure of the same; gold: the truth "
        "as well as it can be measured."
    )
    return Table("table-metrics", headers, tuple(rows), pd.DataFrame(data), note)


def provenance(run: Run) -> Table:
    """Where the numbers come from; what was not recorded is `unknown`."""
    known = flatten(run.provenance)
    model, suite = run.plan.get("model", {}), run.plan.get("suite", {})
    fixed = {
        "run": run.plan.get("name"),
        "schema of records": run.plan.get("schema"),
        "data from": _span(run)[0],
        "data until": _span(run)[1],
        "model": _text(model.get("name")),
        "model fingerprint": model.get("fingerprint"),
        "suite": f"{_text(suite.get('name'))}, version {_text(suite.get('version'))}",
        "suite sha256": suite.get("sha256"),
    }
    for stem in EXPECTED:
        if not any(key.startswith(stem) for key in known):
            fixed[stem] = None
    pairs = [*fixed.items(), *sorted(known.items())]
    rows = tuple((f.markdown(key), f.markdown(_text(value))) for key, value in pairs)
    data = pd.DataFrame([{"field": key, "value": _text(value)} for key, value in pairs])
    return Table("table-provenance", ("what", "value"), rows, data)


def _span(run: Run) -> tuple[str | None, str | None]:
    every = [run.base, *run.cells]
    starts = sorted(str(cell.status["started"]) for cell in every if cell.status.get("started"))
    ends = sorted(str(cell.status["finished"]) for cell in every if cell.status.get("finished"))
    return (starts[0] if starts else None, ends[-1] if ends else None)


def data_until(run: Run) -> str:
    """When the last cell finished (UTC)."""
    return _span(run)[1] or UNKNOWN


def data_date(run: Run) -> str:
    """The day on which the last cell finished."""
    return data_until(run)[:10]


def _text(value: Any) -> str:
    return UNKNOWN if value is None or value == "" else f.value_text(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _ratio(top: float, bottom: float) -> float:
    return top / bottom if np.isfinite(bottom) and bottom > 0 else float("nan")
