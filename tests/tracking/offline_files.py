"""Reads what W&B writes offline, by the format's own description: LevelDB's log with protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32768
FULL, LAST = 1, 4


@dataclass
class OfflineRun:
    """One of W&B's runs: its settings, and the history as rows of (step, values)."""

    id: str = ""
    group: str = ""
    name: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    exit_code: int = -1


def read_offline(folder: Path) -> OfflineRun:
    """The run in an `offline-run-...` directory."""
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun()
    for content in _records(next(folder.glob("*.wandb")).read_bytes()):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.group = record.run.run_id, record.run.run_group
            run.name, run.project = record.run.display_name, record.run.project
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            values = {key: float(value) for key, value in items.items() if not key.startswith("_")}
            run.history.append((record.history.step.num, values))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log behind W&B's header; a record may be in several parts, none crosses a block."""
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        rest = BLOCK - place % BLOCK
        if rest < HEADER:
            place += rest
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
