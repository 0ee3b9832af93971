"""Small real parts for tests: smooth rewards, and everything that a method is given, on any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from harness.api import (
    Adapter,
    AdapterConfig,
    DiffusionModel,
    Generation,
    OptimizerConfig,
    Prompt,
    Randomness,
    Request,
    Reward,
    SamplerConfig,
    TrainedFineTuner,
)
from harness.context import CellContext
from harness.metering import Meter, MeteredModel, TrainingReward
from harness.registry import load_method
from harness.sampling import generate, schedule

CPU = torch.device("cpu")
# Leaves the parameters where they are, so that the gradient can be read off and compared.
STILL = OptimizerConfig(learning_rate=1e-30, weight_decay=0.0, max_gradient_norm=None)


class QuadraticReward(Reward):
    """Minus the mean squared distance of the pixels to 0.8: concave, largest at 0."""

    name, version, differentiable, role, unit = "quadratic", "1", True, "proxy", "squared pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores in the pictures' own precision."""
        return -((images_BCHW - 0.8) ** 2).flatten(1).mean(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class BrightnessReward(Reward):
    """The mean pixel, without a gradient, as a reward that calls an encoder is."""

    name, version, differentiable, role, unit = "brightness", "1", False, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores of detached pictures."""
        return images_BCHW.detach().flatten(1).mean(1)

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class BrokenReward(Reward):
    """The mean pixel plus a constant that is not a number."""

    name, version, differentiable, role, unit = "broken", "1", True, "proxy", "nothing"
    offset = float("nan")

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Not numbers, with a finite gradient."""
        return images_BCHW.flatten(1).mean(1) + self.offset

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


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


@dataclass
class Lab:
    """What a method is given, and what the harness keeps behind it."""

    inner: DiffusionModel
    model: MeteredModel
    reward: TrainingReward
    meter: Meter
    context: CellContext

    def tuner(self, method: str | type, **settings: Any) -> Any:
        """A method by name or class with these settings of its `Config`; the optimiser stands still unless given."""
        found = load_method(method) if isinstance(method, str) else method
        config = found.Config.model_validate({"optimizer": STILL, **settings})
        return found(self.model, self.reward, config, self.context)


def lab(
    model: DiffusionModel,
    reward: type[Reward] = QuadraticReward,
    *,
    seed: int = 0,
    micro_batch: int = 16,
    checkpointing: Literal["auto", "on", "off"] = "off",
    adapter: float = 0.1,
    rank: int = 2,
    **sampler: Any,
) -> Lab:
    """A fresh adapter on the model whose every parameter is `adapter` away from where it starts, and all around it."""
    model.add_adapter(AdapterConfig(rank=rank), Randomness(seed, "initial adapter"))
    for name, parameter in model.adapter_parameters().items():
        shift = Randomness(seed).normal(parameter.shape, "shift", name).to(model.dtype)
        parameter.data = parameter.data.to(model.dtype) + adapter * shift
    meter = Meter()
    randomness = Randomness(seed, "method")
    context = CellContext(model, randomness, SamplerConfig(**{"steps": 4, **sampler}), micro_batch, checkpointing)
    score = TrainingReward([(1.0, reward(model.device))], meter, reward.name)
    return Lab(model, MeteredModel(model, meter), score, meter, context)


def requests(model: DiffusionModel, count: int, seed: int = 0, prompts: int = 2) -> list[Request]:
    """`count` requests, in turn for each of `prompts` one-letter prompts."""
    letters = [Prompt(f"p{i}", "abcdefgh"[i]) for i in range(prompts)]
    noise = Randomness(seed, "noise")
    return [Request(letters[i % prompts], i, noise.normal(model.latent_shape, i)) for i in range(count)]


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


def evaluate(lab: Lab, reward: Reward, batch: Sequence[Request]) -> float:
    """Mean reward of pictures by the deterministic sampler of the lab."""
    sampler = lab.context.sampler.model_copy(update={"eta": 0.0})
    latents = generate(lab.inner, batch, Generation(sampler))
    return float(reward(lab.inner.decode(latents), [r.prompt for r in batch]).mean())
