"""What the harness lends a method inside one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.api import Adapter, DiffusionModel, Diverged, OptimizerConfig, Randomness, Request, SamplerConfig


class ClippedAdamW:
    """AdamW that measures and clips the gradient's norm, and refuses a gradient that is not finite."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> None:
        self._parameters = list(parameters)
        self._limit = float("inf") if config.max_gradient_norm is None else config.max_gradient_norm
        self._adamw = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )

    def zero_grad(self) -> None:
        """Forget accumulated gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Clip, apply, and return the norm before clipping.

        Raises:
            Diverged: The norm is not finite; nothing was applied.
        """
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._limit))
        if not torch.isfinite(torch.tensor(norm)):
            raise Diverged(f"the gradient's norm is {norm}")
        self._adamw.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """AdamW's moments and step counts."""
        state: dict[str, Any] = self._adamw.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore AdamW's moments and step counts."""
        self._adamw.load_state_dict(state)


class CellContext:
    """The context of one cell on one process.

    Args:
        model: The unmetered model, to measure what a step keeps in memory.
        randomness: The cell's streams.
        sampler: The arm's sampler.
        micro_batch: Pictures in memory at once.
        checkpointing: `on`, `off`, or `auto`: where activations of the differentiated steps exceed the limit.
        activation_limit_gib: For `auto`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        randomness: Randomness,
        sampler: SamplerConfig,
        micro_batch: int,
        checkpointing: Literal["auto", "on", "off"] = "auto",
        activation_limit_gib: float = 1.0,
    ) -> None:
        self.randomness, self.sampler, self.micro_batch = randomness, sampler, micro_batch
        self._model, self._checkpointing, self._limit = model, checkpointing, activation_limit_gib * 2**30
        self._row_bytes: int | None = None

    def optimizer(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> ClippedAdamW:
        """AdamW on the adapter's parameters."""
        return ClippedAdamW(parameters, config)

    def micro_batches(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Consecutive parts."""
        for start in range(0, len(requests), self.micro_batch):
            yield requests[start : start + self.micro_batch]

    def checkpointing(self, gradient_steps: int, rows: int) -> bool:
        """Whether the activations of `gradient_steps` steps of `rows` rows should be recomputed."""
        if self._checkpointing != "auto":
            return self._checkpointing == "on" and gradient_steps > 0
        if gradient_steps == 0:
            return False
        if self._row_bytes is None:
            self._row_bytes = activation_bytes(self._model)
        return gradient_steps * rows * self._row_bytes > self._limit

    def gather(self, tensor: Tensor) -> Tensor:
        """One process: the tensor itself."""
        return tensor


def activation_bytes(model: DiffusionModel) -> int:
    """Bytes that autograd keeps for the backward pass of one denoiser row, parameters not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    x = torch.zeros(1, *model.latent_shape, device=model.device, dtype=model.dtype)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph must live until the count is done: freed buffers would be reused under the same address.
        middle = model.training_timesteps // 2
        output = model.predict(x, middle, model.condition([""]), guidance=1.0, adapter=Adapter()).conditional
        total = sum(kept.values())
    del output
    return total
