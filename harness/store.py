"""Files of a run: a file is complete or absent, logs can be cut back, and one process at a time owns a run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import UserError


def utc_now() -> str:
    """The time in ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_bytes(path: Path, content: bytes) -> None:
    """Write, fsync, rename: after a crash the file is the old one, the new one, or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Atomically, indented, keys in the given order."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where the file is absent."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return content


def write_parquet(path: Path, rows: Sequence[Mapping[Any, Any]], schema: Mapping[str, str]) -> None:
    """Rows as a parquet file with the columns and pandas dtypes of `schema`, atomically."""
    import io

    import pandas as pd

    frame = pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=kind) for name, kind in schema.items()})
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_bytes(path, buffer.getvalue())


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """One JSON object as one line; a torn last line is dropped by `cut_back`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def cut_back(path: Path, lines: int) -> None:
    """Keep the first `lines` lines of a log, so that it agrees with the checkpoint that a run resumes from."""
    if path.exists():
        kept = path.read_bytes().splitlines(keepends=True)[:lines]
        write_bytes(path, b"".join(kept))


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Own the run's directory; the kernel releases the lock when the process dies, however it dies.

    Raises:
        UserError: Another process owns it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"another process ({file.read().strip() or 'unknown'}) is working on {run_dir}; "
                f"wait for it, watch it with `python -m harness status {run_dir}`, or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield


SCORE_COLUMNS = {
    "cell": "string",
    "arm": "string",
    "method": "string",
    "training_reward": "string",
    "seed": "int64",
    "variant": "string",
    "point": "string",
    "iteration": "int64",
    "queries": "float64",
    "denoiser_rows": "float64",
    "train_seconds": "float64",
    "split": "string",
    "prompt_id": "string",
    "prompt": "string",
    "noise_id": "int64",
    "reward": "string",
    "score": "float64",
}

METRIC_COLUMNS = {
    "cell": "string",
    "arm": "string",
    "method": "string",
    "training_reward": "string",
    "seed": "int64",
    "variant": "string",
    "point": "string",
    "metric": "string",
    "prompt_id": "string",
    "value": "float64",
    "n": "int64",
}

PROBE_COLUMNS = {
    "cell": "string",
    "arm": "string",
    "method": "string",
    "training_reward": "string",
    "seed": "int64",
    "probe": "string",
    "point": "string",
    "estimator": "string",
    "guidance": "float64",
    "step": "int64",
    "t": "float64",
    "prompt_id": "string",
    "noise_id": "int64",
    "quantity": "string",
    "value": "float64",
}
