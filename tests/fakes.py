"""Small real parts for tests: smooth rewards, and everything that a method is given, on any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.api import Adapter, DiffusionModel, Prompt, Request, Reward, SamplerConfig, TrainedFineTuner
from harness.contracts.lab import CPU, STILL, Lab, evaluate, lab, requests
from harness.contracts.rewards import BrightnessReward, BrokenReward, QuadraticReward
from harness.sampling import schedule

__all__ = [
    "CPU",
    "STILL",
    "BrightnessReward",
    "BrokenReward",
    "InfiniteReward",
    "Lab",
    "QuadraticReward",
    "assert_close",
    "distance",
    "evaluate",
    "gradients",
    "lab",
    "mean_reward",
    "reference_chain",
    "reference_noise",
    "requests",
]


class InfiniteReward(Reward):
    """The mean pixel plus infinity: its gradient alone does not show that it is broken."""

    name, version, differentiable, role, unit = "infinite", "1", True, "proxy", "nothing"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Infinite, with a finite gradient."""
        return images_BCHW.flatten(1).mean(1) + float("inf")

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


def gradients(tuner: TrainedFineTuner, batch: Sequence[Request]) -> dict[str, Tensor]:
    """The gradient, by parameter, that one iteration with one optimiser step leaves behind."""
    tuner.iterate(batch)
    return {name: p.grad.clone() for name, p in tuner.model.adapter_parameters().items() if p.grad is not None}


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    """The same names, and a difference below `tolerance` times the norm of the whole."""
    assert sorted(actual) == sorted(expected)
    assert distance(actual, expected) <= tolerance


def distance(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of what is expected, of all parameters together."""
    difference = sum(float((actual[name] - expected[name]).pow(2).sum()) for name in expected)
    return float((difference / sum(float(e.pow(2).sum()) for e in expected.values())) ** 0.5)


def reference_chain(
    model: DiffusionModel,
    batch: Sequence[Request],
    sampler: SamplerConfig,
    adapters: Sequence[Adapter],
    first: int = 0,
    x: Tensor | None = None,
) -> Tensor:
    """The deterministic DDIM chain from step `first` on, written out independently, with an adapter for each step."""
    steps = schedule(model, sampler)
    texts = [request.prompt.text for request in batch]
    if x is None:
        x = torch.stack([request.noise for request in batch]).to(model.dtype)
    for step, adapter in list(zip(steps, adapters, strict=True))[first:]:
        noise = reference_noise(model, x, step.t, texts, sampler.guidance, adapter)
        x0 = (x - step.sigma * noise) / step.alpha
        x = step.alpha_next * x0 + step.sigma_next * noise
    return x


def reference_noise(
    model: DiffusionModel, x: Tensor, t: int, texts: Sequence[str], guidance: float, adapter: Adapter
) -> Tensor:
    """Guided noise prediction of a model that predicts noise, one denoiser call per branch."""
    conditional = model.denoise(x, t, model.condition(texts), adapter)
    if guidance == 1.0:
        return conditional
    unconditional = model.denoise(x, t, model.condition([""] * len(x)), adapter)
    return (1 - guidance) * unconditional + guidance * conditional


def mean_reward(lab: Lab, latents: Tensor, batch: Sequence[Request]) -> Tensor:
    """Mean reward of latents, a scalar, not metered."""
    return QuadraticReward(CPU)(lab.inner.decode(latents), [r.prompt for r in batch]).mean()
