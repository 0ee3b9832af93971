"""The one sampling loop: deterministic and stochastic steps, log-probabilities, and where the gradient starts.

Every method's chain is this loop. A step is x_t -> N(mean, std^2) with the DDIM family's mean and std (Song et al.
2021, eq. 12 and 16); eta = 0 makes it deterministic, and then it is no action: it has no log-probability. The family
holds for any (alpha, sigma): whatever std is, the step leads from the marginals at t to those at the next timestep,
so that flow models have the same deterministic (there: Euler's) and stochastic samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harness.api import Adapter, Conditioning, DiffusionModel, Generation, Prediction, Request, SamplerConfig
from harness.randomness import Randomness


@dataclass(frozen=True)
class Step:
    """One step of a chain, from timestep t to the next visited one (or to the clean latent).

    Attributes:
        index: 0 is the first step (most noise), T-1 the last.
        t: Timestep that the denoiser is told.
        alpha, sigma: Of x_t = alpha*x0 + sigma*noise at t.
        alpha_next, sigma_next: The same after the step.
        std: Standard deviation of the step's noise: eta * sigma_next/sigma * sqrt(sigma^2 - (alpha/alpha_next)^2 *
            sigma_next^2). With eta = 1 it is that of x_next given x_t and x0, where noise was added step by step.
    """

    index: int
    t: float
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float
    std: float


@dataclass(frozen=True)
class Transition:
    """Distribution of the next latent: N(mean, std^2) in every dimension; std 0 means that it is the mean."""

    mean: Tensor
    std: float


def timesteps(training_timesteps: int, config: SamplerConfig) -> list[int]:
    """Timesteps of models with discrete ones, most noise first, as diffusers' schedulers define the two spacings."""
    n, T = training_timesteps, config.steps
    if config.spacing == "trailing":
        return [round(n - i * n / T) - 1 for i in range(T)]
    return [i * (n // T) + 1 for i in reversed(range(T))]


def schedule(model: DiffusionModel, config: SamplerConfig) -> tuple[Step, ...]:
    """The steps of a chain of `config` on `model`."""
    visited = model.timesteps(config)
    final = (1.0, 0.0) if config.final_alpha == "one" else model.alpha_sigma(0)
    levels = [*(model.alpha_sigma(t) for t in visited), final]
    steps = []
    for index, t in enumerate(visited):
        (alpha, sigma), (alpha_next, sigma_next) = levels[index], levels[index + 1]
        ratio = alpha / alpha_next
        # Where alpha^2 + sigma^2 = 1 the two are one number, but the first is exact at a step that adds no noise.
        added = 1 - ratio**2 if model.prediction_type != "flow" else sigma**2 - (ratio * sigma_next) ** 2
        std = config.eta * sigma_next / sigma * math.sqrt(max(0.0, added))
        steps.append(Step(index, t, alpha, sigma, alpha_next, sigma_next, std))
    return tuple(steps)


def transition(prediction: Prediction, step: Step) -> Transition:
    """The mean is alpha_next*x0 + sqrt(sigma_next^2 - std^2)*noise."""
    direction = math.sqrt(max(0.0, step.sigma_next**2 - step.std**2))
    return Transition(step.alpha_next * prediction.x0 + direction * prediction.noise, step.std)


def log_probability(x_next_BCHW: Tensor, policy: Transition) -> Tensor:
    """Log-density of the next latents, as the MEAN over latent dimensions (B,).

    The mean, not the sum, is the field's convention since Black et al. 2023: clipping ranges such as 1e-4 are on
    that scale.

    Raises:
        ValueError: std is 0; such a step is no action.
    """
    if policy.std == 0:
        raise ValueError("a step without noise is no action and has no log-probability")
    squared = (x_next_BCHW - policy.mean) ** 2 / (2 * policy.std**2)
    return -(squared + math.log(policy.std) + 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


StepNoise = Callable[[Step], Tensor]
Predict = Callable[[Step, Tensor], Prediction]
Observer = Callable[[Step, Tensor, Transition, Tensor], None]
NoiseObserver = Callable[[Step, Tensor, Tensor], None]


def step_noise(model: DiffusionModel, requests: Sequence[Request], randomness: Randomness, purpose: str) -> StepNoise:
    """Noise of stochastic steps, keyed by (purpose, prompt, noise id, step), never by the row of a batch."""

    def draw(step: Step) -> Tensor:
        rows = [randomness.normal(model.latent_shape, purpose, r.prompt.id, r.noise_id, step.index) for r in requests]
        return torch.stack(rows).to(model.device, model.dtype)

    return draw


def evaluation_noise(model: DiffusionModel, requests: Sequence[Request]) -> StepNoise:
    """Noise of an evaluation's stochastic steps: keyed by the requests' ids alone, one for all methods and seeds."""
    return step_noise(model, requests, Randomness(0, "evaluation"), "step")


def initial_latents(model: DiffusionModel, requests: Sequence[Request]) -> Tensor:
    """x_T of the requests, (B, C, H, W)."""
    return torch.stack([r.noise for r in requests]).to(model.device, model.dtype)


def sample(
    model: DiffusionModel,
    x_BCHW: Tensor,
    condition: Conditioning,
    config: SamplerConfig,
    *,
    adapter: Adapter | Callable[[Step], Adapter] = Adapter(),  # noqa: B008 - frozen
    gradient_steps: int = 0,
    checkpointing: bool = False,
    noise: StepNoise | None = None,
    start: int = 0,
    stop: int | None = None,
    predict: Predict | None = None,
    observe: Observer | None = None,
    observe_noise: NoiseObserver | None = None,
    input_gradient: bool = True,
) -> Tensor:
    """Run the chain from x_T.

    Args:
        model: The model.
        x_BCHW: Initial latents.
        condition: B rows.
        config: Steps, spacing, eta and guidance.
        adapter: The adapter of every step, or a function that gives it.
        gradient_steps: K: the last K steps keep their graph, the others run without gradient. Since x_T does not
            depend on the parameters this equals a stop-gradient at x_K (DRaFT, Algorithm 1). K = T is the whole chain.
        checkpointing: Recompute each step's activations in the backward pass instead of keeping them.
        noise: Noise of each step; required where eta > 0.
        start: Run only the steps from this index on; x_BCHW is then the latent before that step.
        stop: Run only the steps before this index; None runs all.
        predict: Says what x_t is, from (step, x_t), instead of the model with condition, guidance and adapter.
        observe: Called after each step with (step, x before, the policy that was sampled, x after).
        observe_noise: Called after each step with (step, x before, the guided noise prediction there).
        input_gradient: As in `DiffusionModel.predict`.

    Returns:
        The latents after the last step that ran.

    Raises:
        ValueError: eta > 0 without `noise`.
    """
    steps = schedule(model, config)
    if config.eta > 0 and noise is None:
        raise ValueError("a stochastic sampler (eta > 0) needs the noise of its steps")
    x = x_BCHW
    for step in steps[start:stop]:
        chosen = adapter(step) if callable(adapter) else adapter
        with_gradient = step.index >= len(steps) - gradient_steps and torch.is_grad_enabled()
        drawn = noise(step) if noise is not None and step.std > 0 else None
        with torch.set_grad_enabled(with_gradient):
            arguments = (model, x, step, condition, config.guidance, chosen, drawn, input_gradient, predict)
            if with_gradient and checkpointing:
                # Everything that the recomputation reads is an argument; nothing random happens inside.
                mean, following, predicted = checkpoint(
                    advance, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                mean, following, predicted = advance(*arguments)
        if observe is not None:
            observe(step, x, Transition(mean, step.std), following)
        if observe_noise is not None:
            observe_noise(step, x, predicted)
        x = following
    return x


def advance(
    model: DiffusionModel,
    x_BCHW: Tensor,
    step: Step,
    condition: Conditioning,
    guidance: float,
    adapter: Adapter,
    noise: Tensor | None,
    input_gradient: bool = True,
    predict: Predict | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: the policy's mean, the next latent (the mean itself where `noise` is None), the predicted noise."""
    if predict is None:
        prediction = model.predict(
            x_BCHW, step.t, condition, guidance=guidance, adapter=adapter, input_gradient=input_gradient
        )
    else:
        prediction = predict(step, x_BCHW)
    policy = transition(prediction, step)
    following = policy.mean if noise is None else policy.mean + policy.std * noise
    return policy.mean, following, prediction.noise


def generate(
    model: DiffusionModel, requests: Sequence[Request], generation: Generation, predict: Predict | None = None
) -> Tensor:
    """Latents (N, C, H, W) of an evaluation: the chain without gradient, with the variant's adapter strength.

    Noise of stochastic samplers is `evaluation_noise`; `predict` is that of `sample`.
    """
    config = generation.sampler
    first = 0 if generation.lora_steps is None else config.steps - generation.lora_steps

    def adapter(step: Step) -> Adapter:
        return Adapter(scale=generation.lora_scale if step.index >= first else 0.0)

    with torch.no_grad():
        return sample(
            model,
            initial_latents(model, requests),
            model.condition([r.prompt.text for r in requests]),
            config,
            adapter=adapter,
            noise=evaluation_noise(model, requests),
            predict=predict,
        )
