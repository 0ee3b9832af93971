"""What selection at generation time shares: make several candidates of each picture, keep the one that scores best.

The weights are the base model's. A method of the family says what the candidates of a request are; the first is the
request itself, so that one candidate is the base sampler, bit for bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from harness.api import (
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    Diverged,
    Generation,
    InferenceConfig,
    InferenceFineTuner,
    Request,
    Reward,
)
from harness.sampling import generate

ConfigT = TypeVar("ConfigT", bound=InferenceConfig)


class SelectionTuner(InferenceFineTuner, Generic[ConfigT]):
    """Keep the best of several candidates by the reward. Subclasses say which, in `candidate`."""

    def __init__(self, model: DiffusionModel, reward: Reward, config: ConfigT, context: Context) -> None:
        self.model, self.reward, self.config, self.context = model, reward, config, context

    @property
    @abstractmethod
    def candidates(self) -> int:
        """How many candidates a picture has."""

    @abstractmethod
    def candidate(self, request: Request, index: int) -> Request:
        """What is generated instead of the request; the request itself for index 0."""

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """The best candidate of each request by the base model; the first of equals."""
        base = replace(generation, lora_scale=0.0)
        with torch.no_grad():
            return torch.cat([self._best(part, base) for part in self.context.micro_batches(requests)])

    def _best(self, part: Sequence[Request], base: Generation) -> Tensor:
        """One candidate of every request at a time: as many pictures in memory as requests."""
        prompts = [request.prompt for request in part]  # what was asked for, whatever the candidate was told
        best, highest = torch.empty(0), torch.empty(0)
        for index in range(self.candidates):
            latents = generate(self.model, [self.candidate(request, index) for request in part], base)
            scores = self.reward(self.model.decode(latents), prompts)
            if not math.isfinite(mean := scores.mean().item()):
                raise Diverged(f"the reward of the candidates is {mean}")
            if index == 0:
                best, highest = latents, scores
            better = scores > highest
            best = torch.where(better.view(-1, 1, 1, 1), latents, best)
            highest = torch.where(better, scores, highest)
        return best

    def planned_cost(self) -> CostRange:
        """Of one picture: every candidate takes a chain without gradient, a decode and a query."""
        rows = self.model.rows_per_latent(self.context.sampler.guidance)
        each = Cost(forward_rows=rows * self.context.sampler.steps, decodes=1, queries=1)
        return CostRange(each * self.candidates, each * self.candidates)
