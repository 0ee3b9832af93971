"""Files of tensors are read without executing anything; what cannot be read so is refused in words."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import UserError


@contextmanager
def reading_tensors(path: Path, what: str) -> Iterator[None]:
    """Around safetensors' readers, or `torch.load(..., weights_only=True)`, of a file that a user gave.

    Args:
        path: The file.
        what: What it should be, as `weights` or `an adapter`, for the message.

    Raises:
        UserError: Whatever the reader raised.
    """
    try:
        yield
    except Exception as error:  # of a file that is none, the readers raise many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no content'}"
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to execute it
            reason = "it is no checkpoint, or holds something else than tensors"
        raise UserError(
            f"{path} cannot be read as {what}: {reason}. Only tensors are read (safetensors, or torch.load with "
            "weights_only=True): a file that would execute code is refused; download it again from its publisher"
        ) from None
