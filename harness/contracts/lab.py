"""Everything that a method is given, on any model: a fresh adapter, a metered model and reward, requests."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from harness.api import (
    AdapterConfig,
    DiffusionModel,
    FineTuner,
    Generation,
    OptimizerConfig,
    Prompt,
    Randomness,
    Request,
    Reward,
    SamplerConfig,
    UserError,
)
from harness.config import explain, merge
from harness.context import CellContext
from harness.contracts.rewards import QuadraticReward
from harness.metering import Meter, MeteredModel, TrainingReward
from harness.registry import find_model, load_method, load_model
from harness.sampling import generate

CPU = torch.device("cpu")
# Leaves the parameters where they are, so that the gradient can be read off and compared.
STILL = OptimizerConfig(learning_rate=1e-30, weight_decay=0.0, max_gradient_norm=None)
# Small enough for a chain of four steps and a handful of pictures. A method takes those that are fields of its Config,
# so one that calls its batch `batch_size` is small by itself; `--set` gives what this does not know.
SMALL: dict[str, Any] = {
    "batch_size": 4,
    "rollout_size": 4,
    "group_size": 2,
    "per_prompt_minimum": 2,
    "m": 3,
    "n": 2,
    "iterations": 3,
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
}


@dataclass
class Lab:
    """What a method is given, and what the harness keeps behind it."""

    inner: DiffusionModel
    model: MeteredModel
    reward: TrainingReward
    meter: Meter
    context: CellContext

    def tuner(self, method: str | type[FineTuner], **settings: Any) -> Any:
        """A method by name or class with these settings of its `Config`; the optimiser stands still unless given."""
        found = load_method(method) if isinstance(method, str) else method
        still = {"optimizer": STILL} if "optimizer" in found.Config.model_fields else {}
        config = found.Config.model_validate({**still, **settings})
        return found(self.model, self.reward, config, self.context)

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the adapter's parameters."""
        return {name: p.detach().clone() for name, p in self.inner.adapter_parameters().items()}


def lab(
    model: DiffusionModel,
    reward: type[Reward] | Reward = QuadraticReward,
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
    built = reward(model.device) if isinstance(reward, type) else reward
    score = TrainingReward([(1.0, built)], meter, built.name)
    return Lab(model, MeteredModel(model, meter), score, meter, context)


def requests(model: DiffusionModel, count: int, seed: int = 0, prompts: int = 2, first: int = 0) -> list[Request]:
    """`count` requests of a seed's stream from the `first` on, in turn for each of `prompts` one-letter prompts."""
    letters = [Prompt(f"p{i}", "abcdefgh"[i]) for i in range(prompts)]
    noise, ids = Randomness(seed, "noise"), range(first, first + count)
    return [Request(letters[i % prompts], i, noise.normal(model.latent_shape, i)) for i in ids]


def evaluate(lab: Lab, reward: Reward, batch: Sequence[Request]) -> float:
    """Mean reward of pictures by the deterministic sampler of the lab."""
    sampler = lab.context.sampler.model_copy(update={"eta": 0.0})
    latents = generate(lab.inner, batch, Generation(sampler))
    return float(reward(lab.inner.decode(latents), [r.prompt for r in batch]).mean())


@dataclass(frozen=True)
class Subject:
    """The method that is checked, and the models that it is checked on.

    Attributes:
        name: As on the command line.
        finetuner: Its class.
        gaussian: The closed-form model in double precision: fast.
        tiny: A latent diffusion model of random weights in double precision: a real UNet, LoRA and decoder.
        overrides: Settings that replace the small ones.
    """

    name: str
    finetuner: type[FineTuner]
    gaussian: DiffusionModel
    tiny: DiffusionModel
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The method's small settings."""
        known = self.finetuner.Config.model_fields
        return merge({name: value for name, value in SMALL.items() if name in known}, self.overrides)

    def tuner(self, lab: Lab, **settings: Any) -> Any:
        """The method in a lab, with its small settings and these on top."""
        return lab.tuner(self.finetuner, **merge(self.settings, settings))


def subject(method: str, overrides: Mapping[str, Any] | None = None) -> Subject:
    """A method by name or path, with the two models.

    Raises:
        UserError: There is no such method, or it has no such setting.
    """
    finetuner = load_method(method)
    found = Subject(method, finetuner, *models(), overrides or {})
    try:
        finetuner.Config.model_validate(found.settings)
    except ValidationError as error:
        raise UserError(explain(error, finetuner.Config, "--set ")) from None
    return found


def models() -> tuple[DiffusionModel, DiffusionModel]:
    """The closed-form Gaussian, and a tiny latent diffusion model of random weights, in double precision."""
    from harness.contracts.tiny import save_tiny_pipeline

    for library in ("diffusers", "transformers"):  # bars of storing and loading mean nothing here
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        directory = save_tiny_pipeline(Path(folder) / "pipeline")
        names = ("gaussian", str(directory))
        gaussian, tiny = (load_model(find_model(name), CPU, torch.float64, None) for name in names)
    return gaussian, tiny
