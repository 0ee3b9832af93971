"""Rewards and a method that tests name as `path/to/plugins.py:Class`; files beside a copy of this one steer them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.api import (
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    Generation,
    InferenceFineTuner,
    MethodConfig,
    Prompt,
    Request,
    Reward,
    TrainedFineTuner,
)
from harness.sampling import generate


def beside(name: str) -> Path:
    """A file in the folder of this one, by which a test steers a plug-in or reads what it saw."""
    return Path(__file__).with_name(name)


class Quadratic(Reward):
    """Minus the squared distance of pixels to 0.8; scoring takes a while during training where a file `slow` is."""

    name, version, differentiable, role, unit = "quadratic", "1", True, "proxy", "squared pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        if images_BCHW.requires_grad and beside("slow").exists():
            time.sleep(1.0)
        return -((images_BCHW.float() - 0.8) ** 2).flatten(1).mean(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class Brightness(Reward):
    """The mean pixel; not a number as soon as a pixel is above 2, which no stored picture has."""

    name, version, differentiable, role, unit = "brightness", "1", True, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        scores = images_BCHW.float().flatten(1).mean(1)
        return scores * float("nan") if images_BCHW.max() > 2 else scores

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class Dimness(Reward):
    """Minus the mean pixel: judges what is trained on brightness."""

    name, version, differentiable, role, unit = "dimness", "1", True, "held-out", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        return -images_BCHW.float().flatten(1).mean(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class Never(Reward):
    """A gold metric that applies to no prompt."""

    name, version, differentiable, role, unit = "never", "1", True, "gold", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Never asked."""
        raise AssertionError

    def applies(self, prompt: Prompt) -> bool:
        """To none."""
        return False


class Fragile(Reward):
    """The first pixel; training fails while a file `broken` is beside this one."""

    name, version, differentiable, role, unit = "fragile", "1", True, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        if images_BCHW.requires_grad and beside("broken").exists():
            raise RuntimeError("the scorer is out of order")
        return images_BCHW.float()[:, 0, 0, 0]

    def applies(self, prompt: Prompt) -> bool:
        """To prompts with an even number of letters, so that a reward with gaps is among those tested."""
        return len(prompt.text) % 2 == 0


class Printed(Reward):
    """The mean pixel of 8-bit pictures; not a number for those that a method makes, which are no such."""

    name, version, differentiable, role, unit = "printed", "1", True, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        levels = images_BCHW.detach().float() * 255
        printed = bool(((levels - levels.round()).abs() < 1e-3).all())
        return images_BCHW.float().flatten(1).mean(1) * (1.0 if printed else float("nan"))

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class Climber(InferenceFineTuner):
    """Moves the finished picture a little up the reward's gradient: a method that differentiates while generating."""

    version = "1"
    stochastic = False
    needs_reward_gradient = True
    Config = MethodConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: MethodConfig, context: Context) -> None:
        self.model, self.reward, self.context = model, reward, context

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """The base sampler's latents plus a tenth of the gradient."""
        base = generate(self.model, requests, replace(generation, lora_scale=0.0))
        with torch.enable_grad():
            latents = base.detach().requires_grad_()
            scores = self.reward(self.model.decode(latents), [request.prompt for request in requests])
            (gradient,) = torch.autograd.grad(scores.sum(), latents)
        return base + 0.1 * gradient

    def planned_cost(self) -> CostRange:
        """One chain and one query with its gradient."""
        rows = self.context.sampler.steps * (1 if self.context.sampler.guidance == 1.0 else 2)
        cost = Cost(forward_rows=rows, decodes=1, queries=1, reward_gradients=1)
        return CostRange(cost, cost)


class Spy(TrainedFineTuner):
    """Trains nothing, and writes down which prompts and noise it is given."""

    version = "1"
    stochastic = False
    needs_reward_gradient = False
    Config = MethodConfig
    requests_per_iteration = 2  # type: ignore[assignment]

    def __init__(self, model: DiffusionModel, reward: Reward, config: MethodConfig, context: Context) -> None:
        self.model, self.reward = model, reward

    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """One query per request, of its noise taken as a picture."""
        with beside("seen.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{r.prompt.id} {r.noise_id} {float(r.noise.sum())!r}\n" for r in requests)
        scores = self.reward(torch.stack([r.noise[:3] for r in requests]), [r.prompt for r in requests])
        return {"reward": float(scores.mean()), "gradient_norm": 0.0}

    def planned_cost(self) -> CostRange:
        """Two queries."""
        return CostRange(Cost(queries=2), Cost(queries=2))

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""
