"""What prepare.py left, and the table of deviations that the tests write beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

Deviations = dict[str, dict[str, float]]


@pytest.fixture(scope="session")
def prepared() -> Path:
    """Directory with checkpoints, pictures and reference scores."""
    directory = Path(os.environ.get("PARITY_DIRECTORY", "")) / "data"
    if not (directory / "reference" / "hpsv2.json").exists():
        pytest.fail("run `tox -e parity`, which makes the reference scores first (PARITY_DIRECTORY says where)")
    return directory


@pytest.fixture(scope="session")
def deviations(prepared: Path) -> Iterator[Deviations]:
    """Largest differences by comparison, and by alteration; written as deviations.json and deviations.md at the end."""
    found: Deviations = {"comparisons": {}, "tolerances": {}, "alterations": {}, "altered tolerances": {}}
    yield found
    (prepared.parent / "deviations.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    lines = ["| comparison | largest difference | tolerance |", "|---|---|---|"]
    for what, bound in (("comparisons", "tolerances"), ("alterations", "altered tolerances")):
        lines += [f"| {name} | {value:.1e} | {found[bound][name]:.0e} |" for name, value in found[what].items()]
    (prepared.parent / "deviations.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
