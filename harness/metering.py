"""Counts what a method spends, by wrapping model and reward: a method cannot forget to count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.api import (
    Adapter,
    AdapterConfig,
    AdapterFile,
    Conditioning,
    Cost,
    DenoiserConfig,
    DiffusionModel,
    Generation,
    Prompt,
    Randomness,
    Request,
    Reward,
    SamplerConfig,
)

Generate = Callable[[Sequence[Request], Generation], Tensor]


class Meter:
    """Cumulative counts of one cell.

    Attributes:
        cost: What records hold.
        rows_to_input: Of the backward rows, how many passed the gradient on to their own input, too: it takes more
            operations than one to the adapter alone. Looked at where methods are timed.
    """

    def __init__(self) -> None:
        self.cost = Cost()
        self.rows_to_input = 0.0

    def add(self, **counts: float) -> None:
        """Add to the counts named."""
        self.cost = self.cost + Cost(**counts)


class Tally:
    """What generated pictures cost, on average."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._cost, self._pictures = meter, Cost(), 0

    def counted(self, generate: Generate) -> Generate:
        """The same generation, its pictures counted."""

        def counting(requests: Sequence[Request], generation: Generation) -> Tensor:
            before = self._meter.cost
            latents = generate(requests, generation)
            self._cost, self._pictures = self._cost + (self._meter.cost - before), self._pictures + len(requests)
            return latents

        return counting

    def per_picture(self) -> dict[str, float]:
        """Mean counts of a picture, by name; nothing where none was generated."""
        return (self._cost * (1 / self._pictures)).counts() if self._pictures else {}


def _inside_backward() -> bool:
    # The only sign that a forward pass is a recomputation; torch's own module tracker relies on it, too.
    return torch._C._current_graph_task_id() != -1


class MeteredModel(DiffusionModel):
    """A model that counts rows and decodes."""

    def __init__(self, inner: DiffusionModel, meter: Meter) -> None:
        self._inner, self._meter = inner, meter
        self.name, self.latent_shape = inner.name, inner.latent_shape
        self.prediction_type, self.training_timesteps = inner.prediction_type, inner.training_timesteps
        self.device, self.dtype = inner.device, inner.dtype
        self.embedded_guidance = inner.embedded_guidance
        self.checkpoint_inside = inner.checkpoint_inside

    def configure(self, config: DenoiserConfig) -> None:
        """As the inner model."""
        self._inner.configure(config)
        self.checkpoint_inside = self._inner.checkpoint_inside

    def timesteps(self, config: SamplerConfig) -> Sequence[float]:
        """As the inner model."""
        return self._inner.timesteps(config)

    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """As the inner model."""
        return self._inner.alpha_sigma(t)

    def condition(self, texts: Sequence[str]) -> Conditioning:
        """As the inner model."""
        return self._inner.condition(texts)

    def denoise(self, x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        """Counts the rows by kind."""
        rows = len(x_BCHW)
        if _inside_backward():
            # Counted first: a recomputation ends inside the denoiser, as soon as the last saved tensor is there.
            self._meter.add(recomputed_rows=rows)
            return self._inner.denoise(x_BCHW, t, condition, adapter)
        output = self._inner.denoise(x_BCHW, t, condition, adapter)
        if not output.requires_grad:
            self._meter.add(forward_rows=rows)
        else:
            self._meter.add(gradient_rows=rows)
            again = rows if self.checkpoint_inside else 0
            onwards = rows if x_BCHW.requires_grad else 0

            def count(gradient: Tensor) -> None:
                self._meter.add(backward_rows=rows, recomputed_rows=again)
                self._meter.rows_to_input += onwards

            output.register_hook(count)
        return output

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Counts the pictures."""
        self._meter.add(decodes=len(latents_BCHW))
        return self._inner.decode(latents_BCHW)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """As the inner model."""
        return self._inner.encode(images_BCHW)

    def add_adapter(self, config: AdapterConfig, randomness: Randomness) -> None:
        """As the inner model."""
        self._inner.add_adapter(config, randomness)

    def load_adapter(self, path: Path) -> AdapterFile:
        """As the inner model."""
        return self._inner.load_adapter(path)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """As the inner model."""
        return self._inner.adapter_parameters()

    def parameter_count(self) -> int:
        """As the inner model."""
        return self._inner.parameter_count()

    def save_adapter(self, directory: Path) -> None:
        """As the inner model."""
        self._inner.save_adapter(directory)

    def fingerprint(self) -> str:
        """As the inner model."""
        return self._inner.fingerprint()


class TrainingReward(Reward):
    """A weighted sum of rewards, each metered: what methods are trained on.

    Args:
        terms: (weight, reward); the score is the sum of weight * score.
        meter: Counts a query per picture and component.
        expression: Shown in errors.
    """

    role = "proxy"
    unit = "weighted sum"
    version = "1"

    def __init__(self, terms: Sequence[tuple[float, Reward]], meter: Meter, expression: str) -> None:
        self._terms, self._meter = terms, meter
        self.name = expression  # type: ignore[misc]
        self.differentiable = all(reward.differentiable for _, reward in terms)  # type: ignore[misc]

    @property
    def components(self) -> int:
        """Queries per picture."""
        return len(self._terms)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The weighted sum, (B,)."""
        weighted = []
        for weight, reward in self._terms:
            scores = reward(images_BCHW, prompts)
            self._meter.add(queries=len(scores))
            if scores.requires_grad:
                scores.register_hook(lambda gradient: self._meter.add(reward_gradients=len(gradient)))
            weighted.append(weight * scores)
        return torch.stack(weighted).sum(0)

    def applies(self, prompt: Prompt) -> bool:
        """Where all components do."""
        return all(reward.applies(prompt) for _, reward in self._terms)
