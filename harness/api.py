"""What a plug-in author reads: the contracts of methods, rewards, models and prompt suites.

Vocabulary: a *row* is one latent through the denoiser, a *query* one picture scored by one component reward, an
*iteration* one collection plus all its optimiser steps. Tensors carry shape suffixes: `x_BCHW` are B latents or
pictures. Pictures are float in [0, 1] nominally and are NOT clamped before a differentiable reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from harness.config import AdapterConfig, DenoiserConfig, InferenceConfig, MethodConfig, OptimizerConfig, SamplerConfig
from harness.cost import Cost, CostRange
from harness.errors import Diverged, UserError
from harness.prompts import Prompt, PromptSuite
from harness.randomness import Randomness
from harness.rewarding import ConfiguredReward, Embedding, Reward, RewardConfig, WeightFile
from harness.tensor_files import reading_tensors

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterFile",
    "Conditioning",
    "ConfiguredReward",
    "Context",
    "Cost",
    "CostRange",
    "DenoiserConfig",
    "DiffusionModel",
    "Diverged",
    "Embedding",
    "FineTuner",
    "Generation",
    "InferenceConfig",
    "InferenceFineTuner",
    "MethodConfig",
    "Optimizer",
    "OptimizerConfig",
    "Prediction",
    "Prompt",
    "PromptSuite",
    "Randomness",
    "Request",
    "Reward",
    "RewardConfig",
    "SamplerConfig",
    "TrainedFineTuner",
    "UserError",
    "WeightFile",
    "reading_tensors",
]


@dataclass(frozen=True)
class Request:
    """One picture to generate.

    Attributes:
        prompt: What to show.
        noise_id: Names the initial latent. Further randomness of this picture is keyed by (prompt.id, noise_id),
            never by its row in a batch.
        noise: The initial latent x_T, float32 (C, H, W) on the CPU.
    """

    prompt: Prompt
    noise_id: int
    noise: Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about each row: tensors with a leading dimension B, by keyword of the denoiser."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Rows of all parts, in order."""
        return Conditioning({name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Adapter:
    """Which adapter a denoiser call uses. An argument of the call, never a context around it: gradient checkpointing
    recomputes the call outside such a context.

    Attributes:
        scale: Factor on the adapter's update; 0 is the base model.
        parameters: Values to use instead of the trained ones (old policies, per-step gradients), by name as in
            `DiffusionModel.adapter_parameters`.
    """

    scale: float = 1.0
    parameters: Mapping[str, Tensor] | None = None


BASE = Adapter(scale=0.0)


@dataclass(frozen=True)
class Prediction:
    """What the denoiser says about x_t = alpha*x0 + sigma*noise, after guidance. All (B, C, H, W).

    Attributes:
        noise: Predicted noise.
        x0: Predicted clean latent.
        conditional: The network's output for the prompt, in its own parametrisation.
        unconditional: The same for the empty prompt; equal to `conditional` without guidance or with embedded one.
    """

    noise: Tensor
    x0: Tensor
    conditional: Tensor
    unconditional: Tensor


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter that was made elsewhere turned out to be.

    Attributes:
        layout: How its file is laid out: `diffusers`, `peft`, `attention-processors`, `kohya`, or a model's own.
        sha256: Of what was read.
        modules: How many layers it changes.
        ranks: Distinct ranks, ascending; empty where it is no LoRA.
        scales: Distinct alpha/rank, ascending; empty where it is no LoRA.
    """

    layout: str
    sha256: str
    modules: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]


class DiffusionModel(ABC):
    """A text-to-image generator seen as the pieces that fine-tuning needs.

    Implementations set the attributes and the abstract methods; guidance and the conversions between
    parametrisations are here, once.

    Attributes:
        name: Shown in reports.
        latent_shape: (C, H, W) of one latent.
        prediction_type: Parametrisation of the denoiser's output. `flow` is a flow model: x_t = (1 - s)*x0 + s*noise
            with s = t/training_timesteps, and timesteps are real numbers. Of all others alpha^2 + sigma^2 = 1, and
            timesteps are the integers from 0 to training_timesteps - 1.
        device: Where the parameters live.
        dtype: Dtype of latents.
        training_timesteps: Number of discrete timesteps (1000 for Stable Diffusion 1.x); of a flow model, the timestep
            of pure noise.
        embedded_guidance: The denoiser was distilled to be told the guidance scale, and has no unconditional branch.
        checkpoint_inside: Each row of the denoiser that keeps its graph is computed again in the backward pass.
    """

    name: str
    latent_shape: tuple[int, int, int]
    prediction_type: PredictionType
    device: torch.device
    dtype: torch.dtype
    training_timesteps: int
    embedded_guidance: bool = False
    checkpoint_inside: bool = False

    @abstractmethod
    def configure(self, config: DenoiserConfig) -> None:
        """Choose how the denoiser computes; called once, before anything else, and only where it is not the default.

        Raises:
            UserError: The model cannot.
        """

    @abstractmethod
    def timesteps(self, config: SamplerConfig) -> Sequence[float]:
        """The timesteps that a chain visits, most noise first.

        Raises:
            UserError: The model has no such chain.
        """

    @abstractmethod
    def alpha_sigma(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) of timestep t in x_t = alpha*x0 + sigma*noise, in double precision."""

    @abstractmethod
    def condition(self, texts: Sequence[str]) -> Conditioning:
        """Encode prompts; cached per text. The empty text is the unconditional row. No gradient flows here."""

    @abstractmethod
    def denoise(self, x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        """One pass of B rows through the denoiser: the raw output in its own parametrisation.

        With embedded guidance the condition has a tensor `guidance` (B,), float32: the scale, which `predict` adds.
        """

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Latents to pictures (B, 3, H, W), nominally in [0, 1], not clamped; differentiable."""

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Pictures in [0, 1] to latents (the mean of the encoder); differentiable."""

    @abstractmethod
    def add_adapter(self, config: AdapterConfig, randomness: Randomness) -> None:
        """Attach a fresh adapter that leaves the output unchanged; replaces an earlier one. Float32 parameters."""

    @abstractmethod
    def load_adapter(self, path: Path) -> AdapterFile:
        """Attach an adapter made elsewhere; replaces the present one. Float32 parameters.

        Args:
            path: A file or directory in the model family's exchange formats.

        Raises:
            UserError: It cannot be read, or not all of it can be used; the present adapter stays.
        """

    @abstractmethod
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of the adapter by name; every other parameter is frozen."""

    @abstractmethod
    def parameter_count(self) -> int:
        """Parameters of the denoiser, the adapter's left out: shown in reports."""

    @abstractmethod
    def save_adapter(self, directory: Path) -> None:
        """Export the adapter in the model family's exchange format (diffusers' `load_lora_weights` reads it)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A sha256 of the base weights and of what else determines the pictures."""

    def rows_per_latent(self, guidance: float) -> int:
        """Denoiser rows of one prediction: two where there is an unconditional branch."""
        return 1 if guidance == 1.0 or self.embedded_guidance else 2

    def draw_timestep(self, draws: Randomness, *keys: str | int) -> float:
        """A random training timestep: uniform over the discrete ones, of a flow model over (0, training_timesteps]."""
        if self.prediction_type != "flow":
            return draws.integer(*keys, below=self.training_timesteps)
        return self.training_timesteps * (1 - draws.integer(*keys, below=2**53) / 2**53)

    def predict(
        self,
        x_BCHW: Tensor,
        t: float,
        condition: Conditioning,
        *,
        guidance: float,
        adapter: Adapter,
        input_gradient: bool = True,
    ) -> Prediction:
        """The guided prediction at timestep t: output = unconditional + guidance*(conditional - unconditional).

        The adapter acts in both branches. With guidance 1 only the conditional row is computed, with any other
        scale two rows per latent in one batch; a denoiser with embedded guidance is told the scale instead, in one
        row. Without `input_gradient` the denoiser sees x detached: a gradient reaches x through the conversions
        between parametrisations alone.
        """
        seen = x_BCHW if input_gradient else x_BCHW.detach()
        if self.embedded_guidance:
            scale = torch.full((len(x_BCHW),), guidance, device=x_BCHW.device)
            told = Conditioning({**condition.tensors, "guidance": scale})
            conditional = unconditional = output = self.denoise(seen, t, told, adapter)
        elif guidance == 1.0:
            conditional = unconditional = output = self.denoise(seen, t, condition, adapter)
        else:
            both = Conditioning.cat([self.condition([""] * len(x_BCHW)), condition])
            unconditional, conditional = self.denoise(torch.cat([seen, seen]), t, both, adapter).chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        noise, x0 = self._noise_and_x0(x_BCHW, t, output)
        return Prediction(noise, x0, conditional, unconditional)

    def _noise_and_x0(self, x: Tensor, t: float, output: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        match self.prediction_type:
            case "epsilon":
                return output, (x - sigma * output) / alpha
            case "v_prediction":
                return alpha * output + sigma * x, alpha * x - sigma * output
            case "sample":
                return (x - alpha * output) / sigma, output
            case "flow":
                return x + alpha * output, x - sigma * output

    def noised(self, x0_BCHW: Tensor, t: float, noise_BCHW: Tensor) -> Tensor:
        """x_t = alpha*x0 + sigma*noise."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0_BCHW + sigma * noise_BCHW


@dataclass(frozen=True)
class Generation:
    """How pictures are generated for evaluation: one variant of a trained cell.

    Attributes:
        sampler: The chain.
        lora_scale: Strength of the adapter.
        lora_steps: The adapter acts in the last `lora_steps` steps only; None means in all.
    """

    sampler: SamplerConfig
    lora_scale: float = 1.0
    lora_steps: int | None = None


class Optimizer(Protocol):
    """What `Context.optimizer` returns."""

    def zero_grad(self) -> None:
        """Forget accumulated gradients."""

    def step(self) -> float:
        """Clip and apply the accumulated gradient; returns its norm before clipping. Raises Diverged if not finite."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class Context(Protocol):
    """What the harness lends a method. Data parallelism changes only this object.

    Attributes:
        randomness: The cell's streams; key draws by the ids of requests.
        sampler: The run's sampler, which a method may change for its training (`eta`).
        micro_batch: How many requests to hold in memory at once; results do not depend on it.
    """

    randomness: Randomness
    sampler: SamplerConfig
    micro_batch: int

    def optimizer(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> Optimizer:
        """AdamW whose step reduces over ranks, measures and clips the norm, and raises Diverged if not finite."""

    def micro_batches(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Consecutive parts of at most `micro_batch` requests."""

    def checkpointing(self, gradient_steps: int, rows: int) -> bool:
        """Whether to checkpoint each sampling step of a chain with this many steps and rows under gradient."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate over ranks (the identity on one process)."""


class FineTuner(ABC):
    """An algorithm that adapts a model to a reward. Subclass `TrainedFineTuner` or `InferenceFineTuner`; the class in a
    file of methods/ is found by itself, `path/to/file.py:Class` works as well.

    Attributes:
        version: Bumped whenever the method's numbers change.
        stochastic: Whether seeds differ beyond the stream of requests and the adapter's initial values. An
            inference-time method that is not stochastic is one cell, whatever the number of seeds.
        needs_reward_gradient: A non-differentiable reward is refused before anything is spent.
        Config: Every hyper-parameter with default and source: a `MethodConfig`, which has an optimiser, or an
            `InferenceConfig` where nothing is trained.
    """

    version: ClassVar[str]
    stochastic: ClassVar[bool]
    needs_reward_gradient: ClassVar[bool]
    Config: ClassVar[type[InferenceConfig]]

    @abstractmethod
    def __init__(self, model: DiffusionModel, reward: Reward, config: Any, context: Context) -> None:
        """The model has its adapter attached; the reward returns training scores and is metered."""

    @abstractmethod
    def planned_cost(self) -> CostRange:
        """Cost of one iteration, or of one picture where nothing is trained: for --dry-run, for the stop rule, and
        checked against the meter by tests.

        Queries are those of a reward with one component; the harness multiplies by the number of components.
        """

    @abstractmethod
    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """Latents (N, C, H, W) of the requests."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beyond the adapter: optimiser, statistics, buffers. Tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class TrainedFineTuner(FineTuner):
    """A method that changes weights: the harness calls `iterate` until the budget is spent.

    Attributes:
        model: The metered model, adapter attached.
        training_sampler: Set in `__init__` by a method that trains with another sampler than the run's: it is then
            evaluated with its own one, too. None: the run's.
    """

    model: DiffusionModel
    training_sampler: SamplerConfig | None = None

    @property
    @abstractmethod
    def requests_per_iteration(self) -> int:
        """How many requests of the seed's stream one iteration reads."""

    @abstractmethod
    def iterate(self, requests: Sequence[Request]) -> Mapping[str, float]:
        """One collection and its optimiser steps. Returns metrics; `reward` and `gradient_norm` among them."""

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """The shared sampler with the adapter on."""
        from harness.sampling import generate

        return generate(self.model, requests, generation)


class InferenceFineTuner(FineTuner):
    """A method that changes no weights: `generate` spends queries and denoiser rows on each picture it makes.

    Its randomness beyond the requests' own noise is `context.randomness`, keyed by the requests' ids, so that a picture
    does not depend on its batch.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing is learnt."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
