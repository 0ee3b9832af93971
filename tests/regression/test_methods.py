"""The numbers of every method are those of results/baselines/methods.json, or its version says that they changed."""

from __future__ import annotations

from typing import Any

import pytest

from harness.api import DiffusionModel
from harness.contracts.lab import Subject
from harness.registry import discover, load_method
from tests.regression.methods import ELSEWHERE, RENEW, SAME_PLATFORM, moved, numbers, platform, read, record_of

METHODS = sorted(discover("methods"))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """The one in the repository."""
    return read()


@pytest.fixture(scope="module")
def tolerance(record: dict[str, Any]) -> float:
    """Tight where bits can be expected to be equal."""
    return SAME_PLATFORM if record["platform"] == platform() else ELSEWHERE


def test_every_method_is_in_the_record(record: dict[str, Any]) -> None:
    """And nothing else."""
    assert sorted(record["methods"]) == METHODS, f"make the record anew: {RENEW}"


@pytest.mark.parametrize("method", METHODS)
def test_numbers_change_with_the_version_only(
    method: str, record: dict[str, Any], tolerance: float, gaussian: DiffusionModel, tiny_model: DiffusionModel
) -> None:
    """Other numbers ask for another version and a new record, another version asks for a new record."""
    old, new = record["methods"][method], record_of(method, gaussian, tiny_model)
    changed = moved(old["numbers"], new["numbers"], tolerance)

    assert old["version"] == new["version"], (
        f"{method} is version {new['version']}, the record has {old['version']}: make it anew, {RENEW}"
    )
    assert not changed, (
        f"the numbers of {method} changed ({'; '.join(changed[:3])}, {len(changed)} in all) and its version is still "
        f"{new['version']}: if this is meant, raise `version` in methods/{method.replace('-', '_')}.py, then {RENEW}"
    )


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("dpok", "kl_weight", 0.01 * 1.01),
        ("ddpo", "clip_range", 1e-3),
        ("draft", "optimizer", {"max_gradient_norm": 0.5}),
        ("refl", "hinge", 1e-3),
    ],
)
def test_a_small_change_is_seen_on_any_platform(
    method: str, setting: str, value: object, record: dict[str, Any], gaussian: DiffusionModel
) -> None:
    """A weight off by 1 %, another bound: more than the looser tolerance on the fast model alone."""
    finetuner = load_method(method)
    fields = finetuner.Config.model_fields
    assert setting in fields, sorted(fields)
    found = numbers(Subject(method, finetuner, gaussian, gaussian, {setting: value}), gaussian, 1.0)
    old = {
        name.removeprefix("gaussian, "): number
        for name, number in record["methods"][method]["numbers"].items()
        if name.startswith("gaussian, ")
    }
    assert moved(old, found, ELSEWHERE)


def test_moved_is_relative_and_sees_what_is_gone() -> None:
    """Relative to the larger number, with a floor for numbers near zero."""
    old = {"a": 1.0, "b": 0.0, "gone": 1.0, "nought": 0.0}
    new = {"a": 1.0 + 1e-7, "b": 1e-5, "new": 1.0, "nought": 1e-12}

    assert moved(old, new, 1e-6) == ["b: 0 → 1e-05", "gone: 1.0 → None", "new: None → 1.0"]
    assert moved(old, {**old, "a": 1.0 + 2e-6}, 1e-6) == ["a: 1 → 1.000002"]
