"""What a contract is, and how one can end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harness.contracts.lab import Subject


class Broken(AssertionError):  # noqa: N818 - an outcome, not a fault
    """A contract does not hold; the message says what was seen."""


class NotApplicable(Exception):  # noqa: N818 - an outcome, not a fault
    """A contract says nothing about this method; the message says why."""


@dataclass(frozen=True)
class Contract:
    """One promise of a method.

    Attributes:
        name: Short, for `--only`.
        promise: What holds, in plain words.
        remedy: What to do where it does not.
        check: Returns where it holds; raises Broken, NotApplicable, or whatever the method raises.
    """

    name: str
    promise: str
    remedy: str
    check: Callable[[Subject], None]


State = Literal["passed", "FAILED", "n/a"]


@dataclass(frozen=True)
class Outcome:
    """How a contract ended for a method, why, and how many seconds it took."""

    contract: Contract
    state: State
    why: str
    seconds: float


def hold(condition: bool, seen: str) -> None:
    """Raises Broken with what was seen instead, unless the condition holds."""
    if not condition:
        raise Broken(seen)
