"""Seconds and memory of each arm, alone in a fresh process: workers of a run share the machine and their history.

The operations of the units that the meter counts are measured in the same pass, once a run (`harness.flops`).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import store
from harness.config import RunConfig
from harness.executors.local import WORKER_ENVIRONMENT

ITERATIONS = 2


def time_arms(config: RunConfig, run_dir: Path, labels: Sequence[str]) -> None:
    """Write timing.json: for each arm what `measure` gives, medians and, under `repetitions`, each process's numbers.

    Arms that are there already are left alone. An arm that cannot be timed does not cost the run its results: it is
    said, logged, and tried again next time.
    """
    path = run_dir / "timing.json"
    timing = store.read_json(path)
    for label in labels:
        if len(timing.get(label, {}).get("repetitions", [0] if label in timing else [])) >= config.timing_repetitions:
            continue
        try:
            each = [_alone("harness.timing", config, label) for _ in range(config.timing_repetitions)]
        except _NotTimedError as error:
            print(f"{label} could not be timed alone ({error}); the same command tries again", file=sys.stderr)
            _note(run_dir, {"event": "not timed", "arm": label, "detail": str(error)})
            continue
        medians = {name: statistics.median(once[name] for once in each) for name in each[0]}
        timing[label] = {**medians, "repetitions": each}
        store.write_json(path, timing)


def count_flops(config: RunConfig, run_dir: Path, rewards: Sequence[str]) -> None:
    """Write flops.json, which `harness.flops.measure` describes, unless it has all of these training rewards.

    What cannot be measured does not cost the run its results: it is said, logged, and tried again next time.
    """
    path = run_dir / "flops.json"
    if set(rewards) <= set(store.read_json(path).get("rewards", {})):
        return
    try:
        store.write_json(path, _alone("harness.flops", config))
    except _NotTimedError as error:
        print(f"operations could not be counted ({error}); the same command tries again", file=sys.stderr)
        _note(run_dir, {"event": "operations not counted", "detail": str(error)})


def _note(run_dir: Path, event: Mapping[str, str]) -> None:
    store.append_line(run_dir / "log.jsonl", {"time": store.utc_now(), **event})


class _NotTimedError(Exception):
    """A timing process failed; says why."""


def _alone(module: str, config: RunConfig, *arguments: str) -> dict[str, Any]:
    """What the module's `measure` gives in a process of its own."""
    arguments = (sys.executable, "-m", module, config.model_dump_json(), *arguments)
    environment = {**os.environ, **WORKER_ENVIRONMENT}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise _NotTimedError((done.stderr.strip().splitlines() or ["no message"])[-1])
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(config: RunConfig, label: str) -> dict[str, float]:
    """One warm-up and `ITERATIONS` timed iterations of an arm on the first training reward, and the same of a batch.

    Returns:
        `seconds_per_picture` of generation and `peak_memory_mib`; where something is trained also
        `seconds_per_iteration`, `seconds_per_query` (the rest of an iteration shared out) and `rows_to_input_share`
        (of the backward rows, how many passed the gradient on to their own input).
    """
    import torch

    from harness.api import Generation, TrainedFineTuner
    from harness.assembly import assemble
    from harness.cell import request_stream
    from harness.grid import Grid
    from harness.metering import Meter
    from harness.records import peak_memory_mib

    torch.set_num_threads(1)
    grid = Grid(config.model_copy(update={"workers": 1}))
    arm, model, meter = grid.arms[label], grid.model, Meter()
    expression, terms = next(iter(grid.training_rewards.items()))
    rewards = grid.build_training_rewards(name for _, name in terms)
    tuner = assemble(grid, arm, expression, rewards, meter, seed=0)
    stream = request_stream(grid.training_prompts(), model.latent_shape, 0)
    measured = {}
    if isinstance(tuner, TrainedFineTuner):
        size = tuner.requests_per_iteration
        tuner.iterate([next(stream) for _ in range(size)])
        before, clock = meter.cost, time.perf_counter()
        for _ in range(ITERATIONS):
            tuner.iterate([next(stream) for _ in range(size)])
        seconds = (time.perf_counter() - clock) / ITERATIONS
        queries = (meter.cost - before).queries / ITERATIONS
        measured = {"seconds_per_iteration": seconds, "seconds_per_query": seconds / queries}
        measured["peak_memory_mib"] = peak_memory_mib()
        if meter.cost.backward_rows:
            measured["rows_to_input_share"] = meter.rows_to_input / meter.cost.backward_rows
    batch = [next(stream) for _ in range(config.evaluation.batch)]
    with torch.no_grad():
        tuner.generate(batch, Generation(config.sampler))
        clock = time.perf_counter()
        tuner.generate(batch, Generation(config.sampler)).cpu()
    measured["seconds_per_picture"] = (time.perf_counter() - clock) / len(batch)
    return {"peak_memory_mib": peak_memory_mib()} | measured


if __name__ == "__main__":
    print(json.dumps(measure(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2])))
