"""What `compare` says of real runs: whether it catches planted losses, and whether it fails the same code.

    python benchmarks/planted_losses.py halved RUN...     a run against itself, stopped at its last point before the end
    python benchmarks/planted_losses.py seeds RUN         groups of five seeds of one arm against other groups

`halved`: the loss is measured first, the margin is a third of it, and the gate must say WORSE from five seeds. `seeds`:
20 pairs of disjoint groups, drawn once by a fixed rule; at no pair it may say WORSE.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.regression.comparing import MARGIN, compare
from harness.regression.gating import Family, match
from harness.regression.snapshot import Snapshot, take

GROUP, PAIRS = 5, 20


def stopped(run: Path, folder: Path) -> tuple[Path, str]:
    """A copy of the records of a run whose cells ended at the last point of their curves; and that point."""
    plan = json.loads((run / "run.json").read_text(encoding="utf-8"))
    points = [p for p in plan["budget"]["curve_points"] if p < plan["budget"]["amount"]]
    if not points:
        raise UserError(f"{run} has no curve: give it budget.curve_points")
    point = f"{points[-1]:g}"
    folder.mkdir()
    for name in ("run.json", "provenance.json"):
        shutil.copy(run / name, folder / name)
    for cell in sorted((run / "cells").iterdir()):
        target = folder / "cells" / cell.name
        target.mkdir(parents=True)
        shutil.copy(cell / "status.json", target)
        scores = pd.read_parquet(cell / "scores.parquet")
        if cell.name != "base":
            scores = scores[scores["point"] == point].assign(point="final")
        scores.to_parquet(target / "scores.parquet", index=False)
    return folder, point


def halved(run: Path) -> None:
    """Every arm of a run against itself, stopped early: the whole comparison, at a third of the loss as margin."""
    with tempfile.TemporaryDirectory() as place:
        copy, point = stopped(run, Path(place) / "stopped")
        old, new = take(run), take(copy)
    reward = old.training_rewards[0]
    for arm in (str(known["label"]) for known in old.arms):
        matched = match(new, old, arm, reward, reward)
        if matched is None:
            continue
        gaps = matched.new - matched.baseline
        loss, spread = -float(gaps.mean()), float(gaps.std(ddof=1))
        if loss <= 0:
            continue
        rows = compare(new, old, loss / 3).rows
        (row,) = (r for r in rows if (r.arm, r.reward, r.family) == (arm, reward, Family.CELL))
        print(
            f"{old.name}, {arm} stopped at {point}: {row.how}, lost {loss:.3f} base SD (SD of pairs {spread:.3f}); "
            f"margin {loss / 3:.3f}: {row.outcome}, p {row.p_worse:.4f}, Holm's {row.adjusted_p:.4f}"
        )


def seeds(run: Path) -> None:
    """The same arm of the same code on other seeds, at the default margin."""
    every = take(run)
    arm, reward = str(every.arms[0]["label"]), every.training_rewards[0]
    known = sorted(every.find(arm, reward))
    groups = np.random.default_rng(0).permutation(known)[: len(known) // GROUP * GROUP].reshape(-1, GROUP)
    pairs = [(i, j) for i in range(len(groups)) for j in range(len(groups)) if i != j]
    chosen = [pairs[k] for k in np.random.default_rng(1).permutation(len(pairs))[:PAIRS]]
    outcomes = Counter(
        str(compare(_only(every, groups[i]), _only(every, groups[j]), MARGIN).outcome) for i, j in chosen
    )
    print(f"{len(known)} seeds in {len(groups)} groups of {GROUP}, {len(chosen)} pairs of groups: {dict(outcomes)}")


def _only(snapshot: Snapshot, kept: np.ndarray) -> Snapshot:
    """The snapshot with these seeds, and the base model."""
    cells = tuple(cell for cell in snapshot.cells if cell.arm == "base" or cell.seed in kept.tolist())
    return replace(snapshot, cells=cells, missing=())


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("halved", "seeds"):
        sys.exit(__doc__)
    for argument in sys.argv[2:]:
        (halved if sys.argv[1] == "halved" else seeds)(Path(argument))
