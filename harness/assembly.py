"""Puts a cell's parts together: the arm's method on a fresh adapter, with a metered model and a metered reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from harness.api import Cost, CostRange, DiffusionModel, FineTuner, Prompt, Randomness, Reward, UserError
from harness.context import CellContext
from harness.given import GivenPictures
from harness.grid import Arm, Grid
from harness.metering import Meter, MeteredModel, TrainingReward


def assemble(
    grid: Grid, arm: Arm, expression: str, rewards: Mapping[str, Reward], meter: Meter, seed: int
) -> FineTuner:
    """The method of an arm, ready to use. Every seed's adapter starts from the same values for all methods."""
    config, model = grid.config, grid.model
    model.add_adapter(config.adapter, Randomness(seed, "initial adapter"))
    context = CellContext(
        model,
        Randomness(seed, "method"),
        arm.sampler,
        config.micro_batch,
        arm.checkpointing,
        config.activation_limit_gib,
    )
    terms = [(weight, rewards[name]) for weight, name in grid.training_rewards[expression]]
    reward = TrainingReward(terms, meter, expression)
    return arm.finetuner(MeteredModel(model, meter), reward, arm.config, context)


def planned_cost(tuner: FineTuner, model: DiffusionModel) -> CostRange:
    """What a method plans, and the rows that a denoiser recomputes by itself in each backward pass."""
    plan = tuner.planned_cost()
    if not model.checkpoint_inside:
        return plan
    expected, maximal = (
        replace(cost, recomputed_rows=cost.recomputed_rows + cost.backward_rows)
        for cost in (plan.expected, plan.maximal)
    )
    return CostRange(expected, maximal)


def iteration_cost(cost: Cost, components: int, unit: str) -> float:
    """What an iteration of this planned cost takes from a budget of `unit`; 0 for seconds, which nobody can plan."""
    amounts = {"queries": cost.queries * components, "denoiser_rows": cost.denoiser_rows, "iterations": 1.0}
    return amounts.get(unit, 0.0)


def check_arms(grid: Grid) -> None:
    """Build every arm once, without loading a reward, so that an impossible one is refused before anything is spent.

    Raises:
        UserError: A method refuses its settings, or the budget does not pay for one iteration of it.
    """
    budget = grid.config.budget
    declared = {name: Declared(source.reward) for name, source in grid.rewards.items()}
    for arm in grid.arms.values():
        for expression, terms in grid.training_rewards.items():
            tuner = assemble(grid, arm, expression, declared, Meter(), seed=0)
            if isinstance(tuner, GivenPictures):
                tuner.check([p for part in grid.evaluated.values() for p in part], grid.config.evaluation.latents)
            needed = iteration_cost(planned_cost(tuner, grid.model).maximal, len(terms), budget.unit)
            if needed > budget.amount and not arm.inference:
                raise UserError(
                    f"a budget of {budget.amount:g} {budget.unit} does not pay for one iteration of {arm.label} on "
                    f"{expression}, which takes up to {needed:g}; raise it, or make the method's batch smaller"
                )


class Declared(Reward):
    """A reward by what its class says; it cannot score."""

    def __init__(self, reward: type[Reward]) -> None:
        self.name, self.version, self.unit = reward.name, reward.version, reward.unit  # type: ignore[misc]
        self.differentiable, self.role = reward.differentiable, reward.role  # type: ignore[misc]

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Never called."""
        raise AssertionError("a reward that was only declared cannot score")

    def applies(self, prompt: Prompt) -> bool:
        """Unknown before the reward is loaded."""
        return True
