"""Sums of LoRA products at a chosen rank.

The sum of w_k B_k A_k is [B_1 .. B_n][w_1 A_1; ..; w_n A_n], of at most the sum of the ranks. Its truncated singular
value decomposition is the nearest matrix of a smaller rank in the Frobenius norm (Eckart and Young 1936). The matrix
itself is never formed: QR decompositions of both sides leave a core of the sum of the ranks. Double precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.errors import UserError

A, B = ".lora_A.", ".lora_B."
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Mixed:
    """An adapter of alpha = rank, and how far it is from the sum of products that it stands for.

    Attributes:
        parameters: Factors by the names of the adapters that were mixed, float64.
        exact_rank: The smallest rank whose error is zero whatever the factors.
        error: Frobenius norm of what is left out, relative to that of the sum, over all modules together.
        worst, worst_module: The same of the module where it is largest.
    """

    parameters: dict[str, Tensor]
    exact_rank: int
    error: float
    worst: float
    worst_module: str


def factor_pairs(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Names of the B and A factors of each module, sorted: files do not keep an order, and sums have one.

    Raises:
        UserError: The parameters are something else than LoRA factors.
    """
    pairs = {name.partition(B)[0]: (name, name.replace(B, A)) for name in sorted(names) if B in name}
    if not pairs or sorted(name for pair in pairs.values() for name in pair) != sorted(names):
        shown = ", ".join(sorted(names)[:3])
        raise UserError(
            f"this model's adapter is no LoRA (its parameters are {shown}), so there are no products to mix; "
            "mix runs of a model with LoRA adapters, such as emoji"
        )
    return pairs


def mix_products(adapters: Sequence[tuple[float, Parameters]], rank: int) -> Mixed:
    """The best adapter of a rank for the weighted sum of products B A.

    Args:
        adapters: (factor on the product, its parameters); the factor is the weight times alpha/rank.
        rank: Of the result; beyond the exact rank its factors are filled up with zeros.
    """
    parameters: dict[str, Tensor] = {}
    left_out, norms, exact = {}, {}, 0
    for module, (name_b, name_a) in factor_pairs(list(adapters[0][1])).items():
        first_b, first_a = adapters[0][1][name_b], adapters[0][1][name_a]
        b = torch.cat([p[name_b].double().flatten(1) for _, p in adapters], dim=1)
        a = torch.cat([factor * p[name_a].double().flatten(1) for factor, p in adapters])
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, singular, vh = torch.linalg.svd(r_b @ r_a.T)
        exact = max(exact, len(singular))
        root, kept = singular[:rank].sqrt(), min(rank, len(singular))
        new_b, new_a = b.new_zeros(len(b), rank), a.new_zeros(rank, a.shape[1])
        new_b[:, :kept] = q_b @ u[:, :kept] * root
        new_a[:kept] = root[:, None] * (vh[:kept] @ q_a.T)
        parameters[name_b] = new_b.reshape(len(b), rank, *first_b.shape[2:])
        parameters[name_a] = new_a.reshape(rank, *first_a.shape[1:])
        left_out[module], norms[module] = singular[rank:].square().sum().item(), singular.square().sum().item()
    worst = max(norms, key=lambda module: _relative(left_out[module], norms[module]))
    error = _relative(sum(left_out.values()), sum(norms.values()))
    return Mixed(parameters, exact, error, _relative(left_out[worst], norms[worst]), worst)


def _relative(left_out: float, norm: float) -> float:
    return math.sqrt(left_out / norm) if norm > 0 else 0.0
