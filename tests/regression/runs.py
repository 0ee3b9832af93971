"""Made-up runs, and what may happen to one between two versions of the code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tests.report.synthetic import main_job, write_run


def made(folder: Path, **changes: Any) -> Path:
    """Two arms, one training reward, five seeds, no pictures."""
    return write_run(folder, main_job(images=False, **changes))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON object in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_scores(run: Path, change: Callable[[pd.DataFrame], pd.DataFrame], cells: str = "*") -> Path:
    """Rewrite the scores of some cells."""
    for path in sorted((run / "cells").glob(f"{cells}/scores.parquet")):
        change(pd.read_parquet(path)).to_parquet(path, index=False)
    return run


def shifted(run: Path, by: float, cells: str, *, spread: float = 0.0, reward: str = "emoji-3d") -> Path:
    """Scores of a reward moved by a constant and, by `spread`, by one more number for each cell."""

    def change(scores: pd.DataFrame) -> pd.DataFrame:
        luck = np.random.default_rng([int(scores["seed"].iloc[0]) + 1, 7]).normal(0, spread)
        mine = scores["reward"] == reward
        return scores.assign(score=scores["score"] + np.where(mine, by + luck, 0.0))

    return edit_scores(run, change, cells)


def reseeded(run: Path, offset: int) -> Path:
    """The same records under other seeds."""
    for path in sorted((run / "cells").glob("*--seed*")):
        stem, _, seed = path.name.rpartition("seed")
        path.rename(path.with_name(f"{stem}seed{int(seed) + offset}-"))
    for path in sorted((run / "cells").glob("*--seed*-")):
        path.rename(path.with_name(path.name.removesuffix("-")))
    edit_scores(run, lambda s: s.assign(seed=s["seed"] + offset, cell=[_moved(c, offset) for c in s["cell"]]), "*--*")

    def plan(content: dict[str, Any]) -> None:
        for cell in content["cells"]:
            if cell["arm"] != "base":
                cell |= {"cell": _moved(cell["cell"], offset), "seed": cell["seed"] + offset}

    edit_json(run / "run.json", plan)
    return run


def _moved(cell: str, offset: int) -> str:
    stem, _, seed = cell.rpartition("seed")
    return f"{stem}seed{int(seed) + offset}"


def seed_gains(run: Path, arm: str, reward: str = "emoji-3d", keep: set[tuple[str, int]] | None = None) -> pd.Series:
    """Gain by seed, straight from the files: mean over prompts of the mean over pictures of tuned minus base."""
    read = [pd.read_parquet(path) for path in (run / "cells").glob("*/scores.parquet")]
    table = pd.concat(read)
    table = table[(table["point"] == "final") & (table["split"] == "held-out") & (table["reward"] == reward)]
    if keep is not None:
        pairs = zip(table["prompt_id"], table["noise_id"], strict=True)
        table = table[[pair in keep for pair in pairs]]
    wide = table.pivot_table(index=["prompt_id", "noise_id"], columns=["arm", "seed"], values="score")
    gains = wide[arm].sub(wide[("base", -1)], axis=0)
    return gains.groupby("prompt_id").mean().mean().sort_index()


def base_sd(run: Path, reward: str = "emoji-3d") -> float:
    """Root mean variance of the base model's pictures within a prompt."""
    table = pd.read_parquet(run / "cells" / "base" / "scores.parquet")
    table = table[(table["point"] == "final") & (table["reward"] == reward)]
    groups = table.groupby("prompt_id")["score"]
    within = groups.var(ddof=1) * (groups.size() - 1)
    return float(np.sqrt(within.sum() / (groups.size() - 1).sum()))
