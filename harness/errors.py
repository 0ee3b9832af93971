"""Errors that the harness tells apart (no torch here, so that the command line starts fast)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what was asked for; the message says what is wrong and what to do, and no traceback is shown."""


class CellsFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """Some cells of a run crashed; what they computed is kept, and the same command runs them again."""


class ContractsBroken(RuntimeError):  # noqa: N818 - reads as what happened
    """A method was checked, and some of its contracts do not hold."""


class Regressed(RuntimeError):  # noqa: N818 - reads as what happened
    """A run was compared with a baseline, and something is worse by more than the margin."""


class Undecided(RuntimeError):  # noqa: N818 - reads as what happened
    """A strict comparison left something open."""


class Diverged(RuntimeError):  # noqa: N818 - a state of a cell, not a fault
    """Training left the finite numbers (NaN or infinite reward, loss or gradient): the cell ends as `diverged`."""


def nearest(word: str, choices: Sequence[str]) -> str:
    """A hint such as `did you mean 'draft-k'?`, with all choices behind it."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(choices) or 'none'}"
