"""DRTune: trained steps all over the chain, and no Jacobian of the network (Wu et al., ECCV 2024).

    s ~ U{1..T-(K-1)*d},  d = floor(T/K);  trained steps t = s + i*d, i = 0..K-1;  t_min ~ U{1..m}
    for t = T..t_min:  out = net_theta(stop_grad(x_t), c, t);  out <- stop_grad(out) unless t is trained
                       at t_min: x_0 = x0_hat(x_t, out), end;  else x_{t-1} = ddim(x_t, out)
    theta <- theta + eta * grad_theta r(x_0, c)

The denoiser's INPUT is detached: a gradient runs back along the sampler's own linear path, and products of the
network's Jacobians, which let it explode, never appear. (t counts the steps that are left, 1 is the last.)
Cost of an update of B pictures: T - t_min + 1 steps forward, at most K of them backward, B queries.
Known from a restatement in a later paper; the ranges of s and m and the defaults are this project's choices.
"""

from __future__ import annotations

from pydantic import Field

from harness.api import Adapter, Context, Cost, CostRange, DiffusionModel, Randomness, Reward, UserError
from harness.sampling import Step
from methods._reward_gradient import Batch, Objective, RewardGradientConfig, RewardGradientTuner


class DRTuneConfig(RewardGradientConfig):
    """DRTune's settings."""

    k: int = Field(2, ge=1, description="Trained steps, K, evenly spaced. This project's choice.")
    m: int = Field(2, ge=1, description="The chain stops at one of its last m steps. This project's choice.")


class DRTune(RewardGradientTuner[DRTuneConfig]):
    """DRTune: the reward's gradient at K spaced steps, with the denoiser's inputs detached."""

    version = "1"
    stochastic = True
    needs_reward_gradient = True
    Config = DRTuneConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: DRTuneConfig, context: Context) -> None:
        super().__init__(model, reward, config, context)
        self.require_steps("drtune.k", config.k)
        self.spacing = len(self.steps) // config.k
        self.starts = range(1, len(self.steps) - (config.k - 1) * self.spacing + 1)
        if config.m > self.trained(1)[-1]:
            raise UserError(
                f"drtune.m={config.m}: a chain could stop before its first trained step; "
                f"lower m to {self.trained(1)[-1]} or raise k"
            )

    def trained(self, start: int) -> list[int]:
        """The trained steps, as numbers of steps left, for one s."""
        return [start + i * self.spacing for i in range(self.config.k)]

    def objective(self, batch: Batch, draws: Randomness) -> Objective:
        """-r(x0_hat(x_{t_min})), at one s and one t_min for the whole update."""
        trained = self.trained(self.starts[draws.integer("s", below=len(self.starts))])
        last = self.steps[-(1 + draws.integer("t_min", below=self.config.m))]
        frozen = Adapter(parameters={name: p.detach() for name, p in self.model.adapter_parameters().items()})

        def adapter(step: Step) -> Adapter:
            return Adapter() if len(self.steps) - step.index in trained else frozen

        x = self.chain(
            batch,
            gradient_steps=len(self.steps),
            kept=self.config.k,
            stop=last.index,
            adapter=adapter,
            input_gradient=False,
        )
        prediction = self.predict(x, last.t, batch, adapter=adapter(last), input_gradient=False)
        reward = self.score(prediction.x0, batch)
        return Objective(loss=-reward, reward=reward)

    def planned_cost(self) -> CostRange:
        """The mean and the most over s and t_min; the step at t_min is not checkpointed."""
        costs = [self.cost_of(start, left) for start in self.starts for left in range(1, self.config.m + 1)]
        return self.range_of(costs, [1.0] * len(costs))

    def cost_of(self, start: int, left: int) -> Cost:
        """Cost of an iteration whose s is `start` and whose t_min is `left`."""
        trained = [t for t in self.trained(start) if t >= left]
        rows = self.config.batch_size * self.rows_per_picture
        recomputed = sum(t > left for t in trained) if self.checkpointed(self.config.k) else 0
        return self.scoring_cost() + Cost(
            forward_rows=rows * (len(self.steps) - left + 1 - len(trained)),
            gradient_rows=rows * len(trained),
            recomputed_rows=rows * recomputed,
            backward_rows=rows * len(trained),
        )
