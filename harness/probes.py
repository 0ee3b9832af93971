"""Measurements of gradients at fixed weights: how long they are at each sampling step, and how much they scatter.

Neither probe moves the adapter, its accumulated gradients or a global generator. Rows are those of `probes.parquet`
(`store.PROBE_COLUMNS`) without the columns that say which cell, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.api import (
    Adapter,
    Context,
    DiffusionModel,
    Diverged,
    OptimizerConfig,
    Prompt,
    Randomness,
    Request,
    Reward,
    SamplerConfig,
    TrainedFineTuner,
    UserError,
)
from harness.grid import Arm
from harness.metering import Meter, MeteredModel
from harness.sampling import Step, Transition, evaluation_noise, initial_latents, sample

NORMS, VARIANCE = "gradient-norms", "gradient-variance"


def independent_requests(prompts: Sequence[Prompt], shape: Sequence[int], randomness: Randomness) -> Iterator[Request]:
    """Requests that share nothing: a uniform prompt and fresh noise each.

    Training's own stream goes through shuffled epochs, in which batches are not quite independent.
    """
    n = 0
    while True:
        prompt = prompts[randomness.integer("prompt", n, below=len(prompts))]
        yield Request(prompt, n, randomness.normal(shape, "x_T", n))
        n += 1


def gradient_norms(
    model: DiffusionModel,
    reward: Reward,
    requests: Sequence[Request],
    sampler: SamplerConfig,
    *,
    checkpointing: bool = False,
) -> list[dict[str, Any]]:
    """Norms of the gradient of each picture's reward, at every sampling step of the chain that is not truncated.

    Quantities, at the sampler's guidance and without guidance; values that are not finite are kept:

    - `norm-latents`: ||dr/dx_t||, x_t being the latent that enters the step;
    - `norm-adapter`: ||dr/dtheta||, theta acting in that step alone;
    - `norm-adapter-total`: the same for theta acting in that step and all after it, which is the gradient that
      truncation to the last K = T - step steps leaves (DRaFT-K).

    Args:
        model: Not metered, with the adapter that is measured.
        reward: What is trained on.
        requests: Pictures, one at a time.
        sampler: A stochastic one gets the noise of an evaluation.
        checkpointing: Recompute activations instead of keeping those of T steps.

    Raises:
        UserError: The reward has no gradient.
    """
    scales = dict.fromkeys((sampler.guidance, 1.0))
    samplers = [sampler.model_copy(update={"guidance": guidance}) for guidance in scales]
    return [row for s in samplers for request in requests for row in _norms(model, reward, request, s, checkpointing)]


def _norms(
    model: DiffusionModel, reward: Reward, request: Request, sampler: SamplerConfig, checkpointing: bool
) -> list[dict[str, Any]]:
    trained = model.adapter_parameters()
    copies: list[dict[str, Tensor]] = []
    steps: list[Step] = []
    latents: list[Tensor] = []

    def adapter(step: Step) -> Adapter:
        copies.append({name: p.detach().clone().requires_grad_() for name, p in trained.items()})
        return Adapter(parameters=copies[-1])

    def observe(step: Step, x: Tensor, policy: Transition, following: Tensor) -> None:
        steps.append(step)
        latents.append(x)

    with torch.enable_grad():
        x_0 = sample(
            model,
            initial_latents(model, [request]).requires_grad_(),
            model.condition([request.prompt.text]),
            sampler,
            adapter=adapter,
            gradient_steps=sampler.steps,
            checkpointing=checkpointing,
            noise=evaluation_noise(model, [request]),
            observe=observe,
        )
        score = reward(model.decode(x_0), [request.prompt]).sum()
    if not score.requires_grad:
        raise UserError(f"{reward.name} has no gradient to measure; train on another reward, or leave the probe out")
    wanted = [*latents, *(tensor for copy in copies for tensor in copy.values())]
    found = iter(torch.autograd.grad(score, wanted))
    by_latents = [next(found) for _ in latents]
    by_adapter = [torch.cat([next(found).double().flatten() for _ in copy]) for copy in copies]
    rows, total = [], torch.zeros_like(by_adapter[0])
    for step, latent, parameters in reversed(list(zip(steps, by_latents, by_adapter, strict=True))):
        total += parameters
        norms = {"norm-latents": latent.double(), "norm-adapter": parameters, "norm-adapter-total": total}
        place = {"guidance": sampler.guidance, "step": step.index, "t": step.t}
        picture = {"prompt_id": request.prompt.id, "noise_id": request.noise_id}
        for quantity, gradient in norms.items():
            rows.append(_row(NORMS, quantity, float(gradient.norm()), **place, **picture))
    return rows


def _row(probe: str, quantity: str, value: float, **other: Any) -> dict[str, Any]:
    empty = {"estimator": "", "step": -1, "t": -1, "prompt_id": "", "noise_id": -1}
    return {"probe": probe, **empty, **other, "quantity": quantity, "value": value}


def gradient_variance(
    arms: Sequence[Arm],
    model: DiffusionModel,
    reward: Callable[[Meter], Reward],
    context: Callable[[Arm], Context],
    requests: Iterator[Request],
    iterations: int,
) -> list[dict[str, Any]]:
    """Mean and scatter of the gradient that one iteration of each arm would apply, at the weights as they are.

    Only arms that are trained and need the reward's gradient are measured: their iterations make one optimiser step
    each. Policy gradients, likelihood and preference methods take several steps on one collection, the later ones
    from weights that the earlier ones moved, so an iteration has no one gradient. What a method remembers of its past
    (adjoint matching's threshold) starts as in a fresh run.

    Quantities by arm (`estimator`), with M iterations of gradients g_i, their mean m and S their sample covariance:

    - `squared-mean`: ||m||^2 - tr(S)/M, unbiased for ||E g||^2; may be negative where the scatter is large;
    - `variance`: tr(S), unbiased;
    - `cosine`: of E g with that of the first arm measured. The inner product is unbiased: in an iteration all arms see
      the same requests, so only products of different iterations enter. It is divided by the roots of both
      `squared-mean`, so that noise neither lowers nor raises it, but it may exceed 1; NaN where one is not positive;
    - `requests`, `rows`, `queries`: of one iteration, as the meter counts them.

    A gradient that a method refuses to give (`Diverged`) makes its statistics NaN.

    Args:
        arms: Those of the run; others than the measured ones are skipped.
        model: Not metered, with the adapter that is measured.
        reward: The training reward, counted by the meter given.
        context: What each arm is given to train with; its optimiser is not used.
        requests: Independent ones; each iteration reads as many as the largest batch, of which an arm takes the first.
        iterations: M, at least 2.

    Raises:
        UserError: An iteration made no optimiser step, or several.
    """
    if iterations < 2:
        raise ValueError("a variance needs at least two iterations")
    measured = [arm for arm in arms if issubclass(arm.finetuner, TrainedFineTuner)]
    measured = [arm for arm in measured if arm.finetuner.needs_reward_gradient]
    parameters = list(model.adapter_parameters().values())
    before = [parameter.grad for parameter in parameters]
    estimators = [_Estimator(arm, model, reward, context(arm)) for arm in measured]
    share = max((estimator.tuner.requests_per_iteration for estimator in estimators), default=0)
    try:
        for _ in range(iterations if estimators else 0):
            batch = [next(requests) for _ in range(share)]
            gradients = [estimator.gradient(batch) for estimator in estimators]
            for estimator, gradient in zip(estimators, gradients, strict=True):
                estimator.moments.add(gradient, gradients[0])
    finally:
        for parameter, accumulated in zip(parameters, before, strict=True):
            parameter.grad = accumulated
    return [row for estimator in estimators for row in estimator.rows(estimators[0].moments.squared_mean)]


class Moments:
    """Running mean and scatter of vectors that come in pairs (Welford 1962): three vectors, however many come."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._other = torch.zeros(())
        self._squares = self._products = 0.0

    def add(self, vector: Tensor, other: Tensor) -> None:
        """One more vector, and the one that it is compared with."""
        self.count += 1
        off, other_off = vector - self._mean, other - self._other
        self._mean, self._other = self._mean + off / self.count, self._other + other_off / self.count
        self._squares += float(off @ (vector - self._mean))
        self._products += float(off @ (other - self._other))

    @property
    def variance(self) -> float:
        """Trace of the sample covariance."""
        return self._squares / (self.count - 1)

    @property
    def squared_mean(self) -> float:
        """Unbiased for the squared norm of the expected vector."""
        return float(self._mean @ self._mean) - self._squares / (self.count * (self.count - 1))

    @property
    def inner(self) -> float:
        """Unbiased for the product of both expectations: the mean over pairs of different places of their products."""
        return float(self._mean @ self._other) - self._products / (self.count * (self.count - 1))


class _Recorder:
    """An optimiser that only looks: its step keeps the accumulated gradient and leaves the weights."""

    def __init__(self, parameters: Sequence[nn.Parameter], gradients: list[Tensor]) -> None:
        self._parameters, self._gradients = list(parameters), gradients

    def zero_grad(self) -> None:
        """Forget accumulated gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> float:
        """Keep a copy in double precision; its norm."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self._gradients.append(torch.cat([part.detach().double().flatten() for part in parts]))
        return float(self._gradients[-1].norm())

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


class _RecordingContext:
    """A context that lends recorders instead of optimisers."""

    def __init__(self, inner: Context) -> None:
        self.randomness, self.sampler, self.micro_batch = inner.randomness, inner.sampler, inner.micro_batch
        self.gradients: list[Tensor] = []
        self._inner = inner

    def optimizer(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> _Recorder:
        """A recorder."""
        return _Recorder(parameters, self.gradients)

    def micro_batches(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """As the inner context."""
        return self._inner.micro_batches(requests)

    def checkpointing(self, gradient_steps: int, rows: int) -> bool:
        """As the inner context."""
        return self._inner.checkpointing(gradient_steps, rows)

    def gather(self, tensor: Tensor) -> Tensor:
        """As the inner context."""
        return self._inner.gather(tensor)


class _Estimator:
    """An arm whose iterations give gradients instead of changing weights."""

    def __init__(self, arm: Arm, model: DiffusionModel, reward: Callable[[Meter], Reward], context: Context) -> None:
        self.arm, self.meter, self.moments = arm, Meter(), Moments()
        self._context = _RecordingContext(context)
        self._size = sum(parameter.numel() for parameter in model.adapter_parameters().values())
        metered = MeteredModel(model, self.meter)
        tuner = arm.finetuner(metered, reward(self.meter), arm.config, self._context)
        assert isinstance(tuner, TrainedFineTuner)
        self.tuner = tuner

    def gradient(self, batch: Sequence[Request]) -> Tensor:
        """The gradient of one iteration on its share of the batch; NaN where the method refuses to give one."""
        recorded = self._context.gradients
        recorded.clear()
        try:
            self.tuner.iterate(batch[: self.tuner.requests_per_iteration])
        except Diverged:
            device = next(iter(self.tuner.model.adapter_parameters().values())).device
            return torch.full((self._size,), float("nan"), dtype=torch.float64, device=device)
        if len(recorded) != 1:
            raise UserError(
                f"{self.arm.label} made {len(recorded)} optimiser steps in an iteration, and the probe {VARIANCE} "
                "compares methods that make one; leave out the arm or the probe"
            )
        return recorded[0]

    def rows(self, reference: float) -> list[dict[str, Any]]:
        """What was found; `reference` is the squared mean of the first estimator."""
        moments, cost = self.moments, self.meter.cost
        length = reference * moments.squared_mean
        comparable = reference > 0 and moments.squared_mean > 0
        values = {
            "squared-mean": moments.squared_mean,
            "variance": moments.variance,
            "cosine": moments.inner / length**0.5 if comparable else float("nan"),
            "requests": self.tuner.requests_per_iteration,
            "rows": cost.denoiser_rows / moments.count,
            "queries": cost.queries / moments.count,
        }
        guidance = self.arm.sampler.guidance
        return [_row(VARIANCE, q, float(v), estimator=self.arm.label, guidance=guidance) for q, v in values.items()]
