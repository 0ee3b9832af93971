"""Drift from the base model: how far a tuned model's pictures are from the base's, at equal prompt and latent.

Deterministic samplers have no path KL; this is the measure that remains defined.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def root_mean_square(tuned_NX: NDArray[np.float32], base_NX: NDArray[np.float32]) -> NDArray[np.float64]:
    """Root mean square difference of each of N items over all their other dimensions, (N,)."""
    difference = (tuned_NX.astype(np.float64) - base_NX.astype(np.float64)).reshape(len(tuned_NX), -1)
    result: NDArray[np.float64] = np.sqrt((difference**2).mean(1))
    return result
