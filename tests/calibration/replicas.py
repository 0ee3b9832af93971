"""Many small runs out of a large one: the same records, a few seeds of each arm at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import run, store
from harness.report.analysis import Analysis, analyse
from harness.report.records import load_run


def run_arm(out: Path, arm: Mapping[str, Any], reward: str, seeds: Sequence[int], budget: Mapping[str, Any]) -> Path:
    """Train and evaluate one arm on the closed-form model, by the harness as users call it."""
    small = {"prompts": {"held-out": 3}, "latents": 4, "diversity_prompts": 1, "diversity_latents": 2, "batch": 64}
    return run(
        {
            "model": "gaussian",
            "preset": "smoke",
            "methods": [],
            "arms": [arm],
            "rewards": [reward],
            "seeds": list(seeds),
            "device": "cpu",
            "workers": 1,
            "timing": False,
            "keep_images": "none",
            "out": str(out),
            "budget": {"curve_points": [], **budget},
            "evaluation": {**small, "curve_latents": 1},
        }
    )


def analyse_seeds(whole: Path, folder: Path, seeds: Mapping[str, Sequence[int]]) -> Analysis:
    """What the report says about a run that had only these seeds of each arm."""
    plan = store.read_json(whole / "run.json")
    plan["cells"] = [c for c in plan["cells"] if c["arm"] == "base" or c["seed"] in seeds[c["arm"]]]
    plan["seeds"] = sorted({seed for some in seeds.values() for seed in some})
    store.write_json(folder / "run.json", plan)
    (folder / "cells").mkdir()
    for cell in plan["cells"]:
        (folder / "cells" / cell["cell"]).symlink_to(whole / "cells" / cell["cell"], target_is_directory=True)
    return analyse(load_run(folder))
