"""Makes the fixture of `tests/engine/fakes.py` known to this folder."""

from __future__ import annotations

from tests.engine.fakes import bench

__all__ = ["bench"]
