"""Randomness derived by hashing, so that no draw depends on the order, the batch or the worker of another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

Key = str | int


class Randomness:
    """A tree of independent random streams, addressed by keys instead of drawn from a shared generator.

    Two calls with the same keys give the same numbers, on any worker and in any order. The global random states
    of torch, numpy and `random` are never read or written.

    Args:
        seed: The root, any integer.
        prefix: Keys that every draw of this object starts with.
    """

    def __init__(self, seed: int, *prefix: Key) -> None:
        self._root = (seed, *prefix)

    def child(self, *keys: Key) -> Randomness:
        """The subtree below `keys`."""
        seed, *prefix = self._root
        return Randomness(int(seed), *prefix, *keys)

    def integer(self, *keys: Key, below: int = 2**63) -> int:
        """A uniform integer in [0, below), one per key (the bias of the modulo is below 2**-60 for small bounds)."""
        text = "\x1f".join(f"{type(k).__name__}:{k}" for k in (*self._root, *keys))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big") % below

    def generator(self, *keys: Key) -> torch.Generator:
        """A fresh CPU generator of its own for `keys`."""
        return torch.Generator().manual_seed(self.integer(*keys, below=2**63))

    def normal(self, shape: Sequence[int], *keys: Key, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normal numbers of `shape` on the CPU. Drawn in float32, so every dtype sees the same values."""
        return torch.randn(tuple(shape), generator=self.generator(*keys), dtype=torch.float32).to(dtype)

    def permutation(self, n: int, *keys: Key) -> list[int]:
        """A uniform permutation of range(n)."""
        order: list[int] = torch.randperm(n, generator=self.generator(*keys)).tolist()
        return order
