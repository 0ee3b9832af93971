"""The main job: plan a run, do what is missing of it, and render its report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness import store
from harness.assembly import check_arms
from harness.config import RunConfig
from harness.errors import CellsFailed, UserError
from harness.executors.local import Event, default_workers, run_cells
from harness.grid import BASE_CELL, Cell, Grid
from harness.metrics.drift import root_mean_square
from harness.mixing import check_mixes, make_mixes
from harness.provenance import collect
from harness.tracking.streaming import Streaming, check_trackers
from harness.variants import missing_variants


@dataclass(frozen=True)
class Job:
    """What a run is about to do."""

    grid: Grid
    run_dir: Path
    pending: tuple[Cell, ...]
    workers: int

    @property
    def ended(self) -> tuple[str, ...]:
        """Cells that there is nothing to do for."""
        return tuple(cell.cell for cell in self.grid.cells if cell not in self.pending)


def plan(config: RunConfig) -> Job:
    """Resolve a configuration and find out which cells are missing.

    Raises:
        UserError: Something is wrong with the configuration, or with what the directory already holds.
    """
    grid = Grid(config)
    run_dir = grid.run_directory()
    _refuse_changed(grid, run_dir)
    check_arms(grid)
    check_mixes(grid)
    pending = tuple(cell for cell in grid.cells if not _is_done(run_dir, cell, grid))
    workers = config.workers or default_workers(config)
    return Job(grid, run_dir, pending, max(1, min(workers, len(pending))))


def run_benchmark(
    config: RunConfig,
    passed: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_start: Callable[[Job], None] = lambda job: None,
) -> Path:
    """Run every missing cell and render the report; see `harness.run`."""
    check_trackers(config.trackers)
    job = plan(config)
    with store.lock(job.run_dir):
        _write_plan(job, passed or {})
        on_start(job)
        with Streaming(job.run_dir, config.trackers, job.ended) as streaming:
            handle = _logging(job.run_dir, on_event, streaming)
            ends = run_cells(config, job.run_dir, job.pending, job.workers, handle) if job.pending else {}
        make_mixes(job.grid, job.run_dir, _noting(job.run_dir))
        for cell in job.grid.cells:
            record_drift(job.run_dir, cell.cell, job.grid)
        if config.timing:
            _time_arms(job)
        from harness.report.build import build_report

        build_report(job.run_dir)
    crashed = [name for name, end in ends.items() if end == "crashed"]
    if crashed:
        shown = ", ".join(crashed[:3]) + (", ..." if len(crashed) > 3 else "")
        raise CellsFailed(
            f"{len(crashed)} of {len(job.grid.cells)} cells crashed ({shown}); "
            f"why is in {job.run_dir}/cells/<cell>/error.txt. The same command runs them again."
        )
    return job.run_dir


def _logging(run_dir: Path, on_event: Callable[[Event], None], streaming: Streaming) -> Callable[[Event], None]:
    def handle(event: Event) -> None:
        if event.kind != "progress":
            line = {"time": store.utc_now(), "event": event.kind, "cell": event.cell, "detail": event.detail}
            line |= event.numbers
            store.append_line(run_dir / "log.jsonl", line)
            if event.kind == "crashed":
                path = run_dir / "cells" / event.cell / "status.json"
                store.write_json(path, {"state": "crashed", "reason": event.detail})
                if not path.with_name("error.txt").exists():
                    path.with_name("error.txt").write_text(event.detail + "\n", encoding="utf-8")
        streaming.event(event)
        on_event(event)

    return handle


def _noting(run_dir: Path) -> Callable[[str], None]:
    def note(detail: str) -> None:
        store.append_line(
            run_dir / "log.jsonl", {"time": store.utc_now(), "event": "mix", "cell": "", "detail": detail}
        )

    return note


def _is_done(run_dir: Path, cell: Cell, grid: Grid) -> bool:
    status = store.read_json(run_dir / "cells" / cell.cell / "status.json")
    scored = status.get("evaluation_rewards", {})
    return (
        status.get("state") in ("completed", "diverged")
        and status.get("training_hash") == cell.training_hash
        and all(scored.get(name) == reward.version for name, reward in grid.rewards.items())
        and not missing_variants(status, grid, cell)
    )


def _refuse_changed(grid: Grid, run_dir: Path) -> None:
    """A run never mixes cells of different settings: refuse, and show the difference."""
    for cell in grid.cells:
        stored = store.read_json(run_dir / "cells" / cell.cell / "identity.json")
        if not stored:
            continue
        now = grid.identity(cell)
        status = store.read_json(run_dir / "cells" / cell.cell / "status.json")
        stored["evaluation"]["rewards"] |= status.get("evaluation_rewards", {})  # those added later are only there
        # A reward that was added scores the stored pictures, and one that is not asked for any more keeps its scores;
        # nothing else may differ.
        both = stored["evaluation"]["rewards"].keys() & grid.rewards.keys()
        for evaluation in (stored["evaluation"], now["evaluation"]):
            evaluation["rewards"] = {name: v for name, v in evaluation["rewards"].items() if name in both}
        if set(now["evaluation"].get("probes", [])) <= set(stored["evaluation"].get("probes", [])):
            stored["evaluation"].pop("probes", None)  # what was measured and is not asked for any more is kept, too
            now["evaluation"].pop("probes", None)
        changes = _differences(_plain(stored), _plain(now))
        if changes:
            raise UserError(
                f"{run_dir} holds {cell.cell} made with other settings: {'; '.join(changes[:4])}. "
                "Give another --out, or the settings that it was made with."
            )


def _plain(content: Any) -> Any:
    import json

    return json.loads(json.dumps(content))


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if lists and any(isinstance(item, dict) for item in old):
        return _differences(dict(enumerate(old)), dict(enumerate(new)), path)
    return [] if old == new else [f"{path} was {old!r} and is now {new!r}"]


def _write_plan(job: Job, passed: Mapping[str, Any]) -> None:
    """Write run.json, keeping the arms, rewards, seeds and cells that earlier commands added to this directory."""
    new = job.grid.describe(passed)
    old = store.read_json(job.run_dir / "run.json")
    if old:
        # What was made elsewhere is only shown beside a run's own arms: settings, claims and seeds stay the run's.
        joins = _all_given(new["arms"]) and not _all_given(old["arms"])
        new["arms"] = _union(old["arms"], new["arms"], "label")
        new["rewards"] = _union(old["rewards"], new["rewards"], "name")
        new["cells"] = _union(old["cells"], new["cells"], "cell")
        new["training_rewards"] = list(dict.fromkeys([*old["training_rewards"], *new["training_rewards"]]))
        new["seeds"] = sorted({*old["seeds"], *new["seeds"]})
        new["reference_arm"] = new["reference_arm"] if passed.get("reference") else old["reference_arm"]
        new["passed"] = {**old["passed"], **new["passed"]}
        if joins:
            new |= {key: old[key] for key in ("config", "passed", "seeds")}
    store.write_json(job.run_dir / "run.json", {"schema": new["schema"], "name": job.run_dir.resolve().name, **new})
    if not (job.run_dir / "provenance.json").exists() or job.pending:
        command = "python -m harness " + " ".join(sys.argv[1:]) if sys.argv[1:] else "harness.run(config)"
        store.write_json(job.run_dir / "provenance.json", collect(job.grid, command))


def _all_given(arms: Sequence[Mapping[str, Any]]) -> bool:
    return all(arm.get("kind") == "given" for arm in arms)


def _union(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    merged = {item[key]: item for item in old}
    merged.update({item[key]: item for item in new})
    return list(merged.values())


def record_drift(run_dir: Path, cell: str, grid: Grid) -> None:
    """Add a cell's drift from the base to its metrics, from the latents that both stored."""
    directory, base = run_dir / "cells" / cell, run_dir / "cells" / BASE_CELL
    paths = [
        directory / "latents.npz",
        base / "latents.npz",
        directory / "metrics.parquet",
        directory / "scores.parquet",
    ]
    if cell == BASE_CELL or not all(path.exists() for path in paths):
        return
    metrics = pd.read_parquet(directory / "metrics.parquet")
    if ((metrics["metric"] == "drift_latent_rms") & (metrics["point"] == "final")).any():
        return
    # Latents are stored in the order of the evaluation; scores need not be, since a reward may not apply to a prompt.
    prompts = [p.id for part in grid.evaluated.values() for p in part for _ in range(grid.config.evaluation.latents)]
    drift = root_mean_square(np.load(paths[0])["latents"], np.load(paths[1])["latents"])
    by_prompt = pd.DataFrame({"prompt_id": prompts, "value": drift}).groupby("prompt_id", sort=False)["value"]
    scores = pd.read_parquet(directory / "scores.parquet")
    first = scores[scores["point"] == "final"].iloc[0]
    rows = [
        {
            **{name: first[name] for name in ("cell", "arm", "method", "training_reward", "seed", "variant")},
            "point": "final",
            "metric": "drift_latent_rms",
            "prompt_id": prompt_id,
            "value": values.mean(),
            "n": len(values),
        }
        for prompt_id, values in by_prompt
    ]
    store.write_parquet(directory / "metrics.parquet", [*metrics.to_dict("records"), *rows], store.METRIC_COLUMNS)


def _time_arms(job: Job) -> None:
    from harness.timing import count_flops, time_arms

    grid = job.grid
    time_arms(grid.config, job.run_dir, list(grid.arms))
    if any(arm.kind == "training" for arm in grid.arms.values()):
        components = [name for terms in grid.training_rewards.values() for _, name in terms]
        count_flops(grid.config, job.run_dir, components)
