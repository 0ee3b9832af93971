"""From a configuration to the plan of a run: arms, cells, and the hashes that say what may be reused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

import harness
from harness.api import DiffusionModel, FineTuner, InferenceConfig, InferenceFineTuner, Prompt, PromptSuite, Reward
from harness.config import ArmConfig, RunConfig, SamplerConfig, explain, merge, split_outside_brackets
from harness.errors import UserError, nearest
from harness.given import Given
from harness.prompts import SPLITS
from harness.registry import (
    ModelSource,
    default_suite,
    discover,
    find_model,
    load_method,
    load_model,
    load_suite,
    reward_names,
)
from harness.reward_sources import RewardSource, find_all, find_reward, parse_weights

SCHEMA = 1
BASE_CELL = "base"
# What changes neither a cell nor which cells there are: the directory of a run does not depend on it.
ADDED_LATER = {
    *("out", "workers", "device", "keep_images", "timing", "timing_repetitions", "variants", "mixes", "findings"),
    *("evaluation_rewards", "reward_weights", "denoiser", "trackers"),
}


@dataclass(frozen=True)
class Arm:
    """A method, ready to be built."""

    label: str
    method: str
    finetuner: type[FineTuner]
    config: InferenceConfig
    sampler: SamplerConfig
    checkpointing: Literal["auto", "on", "off"]
    overrides: Mapping[str, Any]

    @property
    def kind(self) -> Literal["training", "inference", "given"]:
        """What it does in this run: train, spend on each picture, or only show what was made elsewhere."""
        if issubclass(self.finetuner, Given):
            return "given"
        return "inference" if self.inference else "training"

    @property
    def inference(self) -> bool:
        """Whether it changes no weights, and spends queries and rows on each picture instead."""
        return issubclass(self.finetuner, InferenceFineTuner)

    @property
    def seeded(self) -> bool:
        """Whether seeds differ: always where something is trained, since the stream of requests is the seed's."""
        return not self.inference or self.finetuner.stochastic


@dataclass(frozen=True)
class Cell:
    """One (arm, training reward, seed); the base model has arm `base`, no reward and seed -1."""

    cell: str
    arm: str
    reward: str
    seed: int
    training_hash: str
    evaluation_hash: str


def slug(text: str) -> str:
    """A readable file name; distinct texts that would collide get a hash."""
    plain = re.sub(r"[^A-Za-z0-9.=*+_-]+", "-", text).strip("-.") or "x"
    return plain if plain == text else f"{plain}-{digest(text)[:6]}"


def digest(content: Any) -> str:
    """Sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def build_arm(arm: ArmConfig, config: RunConfig) -> Arm:
    """Validate an arm's settings.

    Raises:
        UserError: Unknown method or setting, or a value out of range.
    """
    finetuner = load_method(arm.method)
    overrides = dict(arm.overrides)
    sampler_overrides = overrides.pop("sampler", {})
    checkpointing = overrides.pop("checkpointing", config.checkpointing)
    if isinstance(checkpointing, bool):  # YAML reads a bare on or off so
        checkpointing = "on" if checkpointing else "off"
    if checkpointing not in ("auto", "on", "off"):
        raise UserError(f"{arm.label}: checkpointing={checkpointing!r}: write auto, on or off")
    if sampler_overrides and issubclass(finetuner, InferenceFineTuner):
        raise UserError(
            f"{arm.label}: {arm.method} trains nothing and generates with the run's sampler; "
            "set that one for all arms, as in --set sampler.steps=20"
        )
    values = _with_optimizer(merge(config.settings.get(arm.method, {}), overrides), finetuner)
    try:
        method_config = finetuner.Config.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, finetuner.Config, f"{arm.method}.", _optimizer_fields(finetuner))) from None
    try:
        sampler = SamplerConfig.model_validate({**config.sampler.model_dump(), **sampler_overrides})
    except ValidationError as error:
        raise UserError(explain(error, SamplerConfig, "sampler.")) from None
    return Arm(arm.label, arm.method, finetuner, method_config, sampler, checkpointing, arm.overrides)


def _with_optimizer(values: dict[str, Any], finetuner: type[FineTuner]) -> dict[str, Any]:
    """`learning_rate=1e-3` means `optimizer.learning_rate=1e-3`: nobody should have to know the nesting."""
    known = _optimizer_fields(finetuner)
    nested = {key: value for key, value in values.items() if key in known}
    rest = {key: value for key, value in values.items() if key not in known}
    if nested:
        rest["optimizer"] = {**rest.get("optimizer", {}), **nested}
    return rest


def _optimizer_fields(finetuner: type[FineTuner]) -> list[str]:
    """Settings of the optimiser; a name that the method has a setting of its own for means that one."""
    fields = finetuner.Config.model_fields
    inner = fields["optimizer"].default_factory if "optimizer" in fields else None
    return [name for name in type(inner()).model_fields if name not in fields] if callable(inner) else []  # type: ignore[call-arg]


def parse_reward(expression: str) -> list[tuple[float, str]]:
    """`2*emoji-3d+1*emoji-clip` is [(2, emoji-3d), (1, emoji-clip)].

    Raises:
        UserError: A term has another form.
    """
    terms = []
    for term in split_outside_brackets(expression, "+"):
        match = re.fullmatch(r"\s*(?:(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\s*\*)?\s*([^*\s][^*]*?)\s*", term)
        if not match:
            raise UserError(f"the reward {expression!r} is not understood: write 2*emoji-3d+1*emoji-clip")
        terms.append((float(match[1] or 1), match[2]))
    return terms


class Grid:
    """The plan of a run, with what workers need to carry it out.

    Args:
        config: The resolved configuration.
        model: An already loaded model, or None to load it (its fingerprint is part of every hash).

    Raises:
        UserError: Anything that would make a cell impossible, before anything is spent.
    """

    def __init__(self, config: RunConfig, model: DiffusionModel | None = None) -> None:
        self.config = config
        self.arms = {arm.label: build_arm(arm, config) for arm in config.all_arms()}
        if config.reference is not None and config.reference not in self.arms:
            raise UserError(f"--reference {config.reference!r} is no arm of this run: {', '.join(self.arms)}")
        known = list(dict.fromkeys([*(arm.method for arm in self.arms.values()), *discover("methods")]))
        for name in config.settings:
            if name not in known:
                raise UserError(f"settings are given for {name!r}, which is no method; {nearest(name, known)}")
        self.source: ModelSource = find_model(config.model, config.revision)
        self.suite: PromptSuite = load_suite(config.suite or default_suite(self.source))
        self._check_suite()
        self.training_rewards = {expression: parse_reward(expression) for expression in config.rewards}
        trained_on = [name for terms in self.training_rewards.values() for _, name in terms]
        self.rewards: dict[str, RewardSource] = self._find_rewards(trained_on)
        self._check_rewards(trained_on)
        self._check_variants()
        self.model = model or load_model(
            self.source, pick_device(config.device), pick_dtype(config), config.revision, config.denoiser
        )
        for sampler in [config.sampler, *(arm.sampler for arm in self.arms.values())]:
            self.model.timesteps(sampler)  # refuses a chain that the model does not have
        self.evaluated: dict[str, tuple[Prompt, ...]] = {
            split: self.suite.split(split)[: config.evaluation.prompts[split]]
            for split in SPLITS
            if split in config.evaluation.prompts
        }
        self.cells = [self._base_cell(), *self._cells_of_arms()]

    def _check_suite(self) -> None:
        trained = [arm.label for arm in self.arms.values() if not arm.inference]
        if trained and not self.suite.training:
            raise UserError(
                f"{trained[0]} needs prompts to train on, and the suite {self.suite.name} has held-out ones only; "
                "train on another suite, and score the adapter on this one with `evaluate` (docs/prompts.md)"
            )

    def _find_rewards(self, trained_on: Sequence[str]) -> dict[str, RewardSource]:
        """What training and evaluation need, and nothing that lacks its weights, before anything is spent."""
        # Also those of a file of settings are for rewards that exist.
        weights = parse_weights([f"{name}={place}" for name, place in self.config.reward_weights.items()])
        family = self.source.family
        every = find_all(family, weights)[0] if "all" in self.config.evaluation_rewards else {}
        asked = [name for name in self.config.evaluation_rewards if name != "all"]
        names = dict.fromkeys([*trained_on, *asked, *reward_names(family), *every])
        found = {name: every.get(name) or find_reward(name, weights) for name in names}
        for source in found.values():
            source.check()
        return found

    def _check_rewards(self, trained_on: Sequence[str]) -> None:
        for name in trained_on:
            reward = self.rewards[name].reward
            if reward.role != "proxy" and any(arm.kind != "given" for arm in self.arms.values()):
                raise UserError(f"{name} is a {reward.role} reward: it only judges, and is never trained on")
            for arm in self.arms.values():
                if arm.finetuner.needs_reward_gradient and not reward.differentiable:
                    raise UserError(
                        f"{arm.method} needs the reward's gradient, and {name} has none; "
                        "take a policy-gradient method such as ddpo, or a differentiable reward"
                    )

    def _check_variants(self) -> None:
        steps, stopping = self.config.sampler.steps, self.config.early_stopping
        for variant in self.config.variants:
            if variant.lora_steps is not None and variant.lora_steps > steps:
                raise UserError(f"{variant.label} exceeds the {steps} steps of the run's sampler; lower it")
        if stopping is None:
            return
        for _, name in parse_reward(stopping.reward):
            if name not in self.rewards:
                raise UserError(
                    f"early_stopping.reward: {name!r} scores nothing in this run; {nearest(name, list(self.rewards))}"
                )
        if not self.suite.split("validation"):
            raise UserError(
                f"early stopping needs validation prompts, and the suite {self.suite.name} has none; give a .jsonl "
                "with 'split': 'validation' (docs/adding-a-suite.md), or leave early stopping out"
            )

    def training_identity(self, arm: Arm, expression: str, seed: int) -> dict[str, Any]:
        """Everything that a trained adapter depends on, or the pictures of a method that trains none."""
        own = {"kind": arm.kind} if arm.inference else self._trained_with()
        return {
            "engine": harness.__version__,
            "method": [arm.method, arm.finetuner.version, arm.config.model_dump(mode="json")],
            "reward": [
                [weight, name, self.rewards[name].version] for weight, name in self.training_rewards[expression]
            ],
            "seed": seed,
            "sampler": arm.sampler.model_dump(),
            **({} if self.config.reward_dtype == "float32" else {"reward_dtype": self.config.reward_dtype}),
            **own,
            "suite": self.suite.sha256,
            "model": self.fingerprint,
            "dtype": self.config.dtype,
            **self._compiled(),
        }

    def _trained_with(self) -> dict[str, Any]:
        return {"adapter": self.config.adapter.model_dump(), "budget": self.config.budget.model_dump()}

    def build_training_rewards(self, names: Iterable[str]) -> dict[str, Reward]:
        """Instances of these rewards for training, in the dtype that the run asks for."""
        dtype: torch.dtype = getattr(torch, self.config.reward_dtype)
        return {name: self.rewards[name].build(self.model.device, dtype) for name in dict.fromkeys(names)}

    def evaluation_identity(self) -> dict[str, Any]:
        """Everything that scores depend on beyond the adapter."""
        stopping = self.config.early_stopping
        return {
            **({"early_stopping": stopping.model_dump()} if stopping else {}),
            **({"probes": list(self.config.probes)} if self.config.probes else {}),
            "engine": harness.__version__,
            "sampler": self.config.sampler.model_dump(),
            "evaluation": self.config.evaluation.model_dump(mode="json"),
            "rewards": {name: reward.version for name, reward in self.rewards.items()},
            "suite": self.suite.sha256,
            "model": self.fingerprint,
            "dtype": self.config.dtype,
            **self._compiled(),
        }

    def _compiled(self) -> dict[str, Any]:
        # Recomputing activations gives the same numbers, another kernel does not.
        return {"compile": True} if self.config.denoiser.compile else {}

    def identity(self, cell: Cell) -> dict[str, Any]:
        """What a cell is made of: stored beside its records, so that changed settings are seen and shown."""
        base = cell.cell == BASE_CELL
        return {
            "training": {"model": self.fingerprint}
            if base
            else self.training_identity(self.arms[cell.arm], cell.reward, cell.seed),
            "evaluation": self.evaluation_identity(),
        }

    @property
    def model_name(self) -> str:
        """As given for an embedded model, else what the model calls itself."""
        return self.config.model if self.source.family != "any" else self.model.name

    @cached_property
    def fingerprint(self) -> str:
        """Of the model's weights, computed once."""
        return self.model.fingerprint()

    def _base_cell(self) -> Cell:
        return Cell(BASE_CELL, BASE_CELL, "", -1, digest(self.fingerprint), digest(self.evaluation_identity()))

    def _cells_of_arms(self) -> list[Cell]:
        evaluation = digest(self.evaluation_identity())
        places = [
            (arm, expression, seed if arm.seeded else 0)
            for seed in self.config.seeds  # seeds outermost: a run that is stopped early has every arm
            for expression in self.training_rewards
            for arm in self.arms.values()
            if arm.seeded or seed == self.config.seeds[0]
        ]
        return [
            Cell(
                f"{slug(arm.label)}--{slug(expression)}--seed{seed}",
                arm.label,
                expression,
                seed,
                digest(self.training_identity(arm, expression, seed)),
                evaluation,
            )
            for arm, expression, seed in places
        ]

    def training_prompts(self) -> tuple[Prompt, ...]:
        """What methods are trained on."""
        return self.suite.training

    def run_directory(self) -> Path:
        """--out, or results/<preset>-<hash of what was asked for>."""
        if self.config.out is not None:
            return self.config.out
        identity = self.config.model_dump(mode="json", exclude=ADDED_LATER) | self._compiled()
        return Path("results") / f"{self.config.preset}-{digest([identity, self.fingerprint])[:8]}"

    def describe(self, passed: Mapping[str, Any]) -> dict[str, Any]:
        """The content of run.json (see results/README.md)."""
        methods = discover("methods")
        parameters = self.model.parameter_count()
        return {
            "schema": SCHEMA,
            "config": self.config.model_dump(mode="json", exclude={"out", "workers", "device", "trackers"}),
            "passed": json.loads(json.dumps(dict(passed), default=str)),
            "arms": [
                {
                    "label": arm.label,
                    "method": arm.method,
                    "kind": arm.kind,
                    "seeded": arm.seeded,
                    "version": arm.finetuner.version,
                    "overrides": dict(arm.overrides),
                    "config": arm.config.model_dump(mode="json"),
                    "sampler": arm.sampler.model_dump(),
                    "description": methods[arm.method].description
                    if arm.method in methods
                    else (arm.finetuner.__doc__ or "").split("\n")[0],
                    "needs_reward_gradient": arm.finetuner.needs_reward_gradient,
                }
                for arm in self.arms.values()
            ],
            "reference_arm": self.config.reference or next(iter(self.arms)),
            "training_rewards": list(self.training_rewards),
            "rewards": [
                {
                    "name": name,
                    "version": source.version,
                    "role": source.reward.role,
                    "differentiable": source.reward.differentiable,
                    "unit": source.reward.unit,
                    "family": source.reward.family,
                    "description": (source.reward.__doc__ or "").split("\n")[0],
                    "weights_sha256": dict(source.sha256),
                }
                for name, source in self.rewards.items()
            ],
            "seeds": list(self.config.seeds),
            "suite": {
                "name": self.suite.name,
                "version": self.suite.version,
                "sha256": self.suite.sha256,
                "evaluated": {split: [p.id for p in prompts] for split, prompts in self.evaluated.items()},
            },
            "model": {
                "name": self.model_name,
                "fingerprint": self.fingerprint,
                "parameters": parameters,
            },
            "sampler": self.config.sampler.model_dump(),
            "budget": self.config.budget.model_dump(mode="json"),
            "cells": [vars(cell) for cell in self.cells],
        }


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        UserError: The device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not understood: cpu, cuda, cuda:1 ...") from None
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise UserError(f"--device {name}: nothing can be computed there; take cpu, or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is usable here; take --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def pick_dtype(config: RunConfig) -> torch.dtype:
    """The torch dtype of the frozen weights."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype
