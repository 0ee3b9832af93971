"""Where numbers come from: code, packages, hardware, weights; unknown things are called unknown."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import harness
from harness.grid import Grid
from harness.store import utc_now

PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "open_clip_torch", "timm", "torchvision",
    "numpy", "scipy", "pandas", "pyarrow", "pillow", "matplotlib",
)  # fmt: skip


def collect(grid: Grid, command: str) -> dict[str, Any]:
    """The content of provenance.json."""
    return {
        "harness": harness.__version__,
        "git": _git(),
        "command": command,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),  # which kernels run, and so how they round
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "threads_per_worker": 1,
        "deterministic": "bit-equal on one platform, for resumed runs and any number of workers (CPU)",
        "model": {"name": grid.model_name, "fingerprint": grid.fingerprint},
        "suite": {"name": grid.suite.name, "version": grid.suite.version, "sha256": grid.suite.sha256},
        "started": utc_now(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _git() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout

    try:
        difference = git("diff", "HEAD")
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain").strip()),
            "difference_sha256": hashlib.sha256(difference.encode()).hexdigest() if difference else "",
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": "unknown", "difference_sha256": "unknown"}


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or ("unknown" if sys.platform != "darwin" else "Apple")
