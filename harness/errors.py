"""Errors that the harness tells apart (no torch here, so that the command line starts fast)."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was asked for; the message says what is wrong and what to do, and no traceback is shown."""


class CellsFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """Some cells of a run crashed; what they computed is kept, and the same command runs them again."""


class Diverged(RuntimeError):  # noqa: N818 - a state of a cell, not a fault
    """Training left the finite numbers (NaN or infinite reward, loss or gradient): the cell ends as `diverged`."""
