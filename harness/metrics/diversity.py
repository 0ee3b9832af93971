"""Diversity of pictures of one prompt, from unit-norm embeddings; always within a prompt, then averaged by readers.

Between prompts pictures differ anyway, which would hide a collapse within each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pairwise_distance(embeddings_ND: NDArray[np.float64]) -> float:
    """Mean cosine distance 1 - <e_i, e_j> over pairs i < j; range [0, 2], larger is more diverse; n >= 2."""
    n = len(embeddings_ND)
    similarity = _unit(embeddings_ND) @ _unit(embeddings_ND).T
    return float(1 - (similarity.sum() - np.trace(similarity)) / (n * (n - 1)))


def vendi_score(embeddings_ND: NDArray[np.float64]) -> float:
    """Exponential of the entropy of the eigenvalues of K/n with K the cosine similarities (Friedman and Dieng 2023).

    The effective number of different pictures: range [1, n]; grows with n, so n must be equal wherever compared.
    """
    unit = _unit(embeddings_ND)
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T / len(unit))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _unit(embeddings: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return result
