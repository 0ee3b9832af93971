"""What a worker keeps between cells, and how it says how far it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.api import Generation, Reward
from harness.assembly import Declared
from harness.base_reference import BaseReference, base_reference
from harness.evaluation import Evaluator
from harness.grid import Grid
from harness.registry import load_embedding

Progress = Callable[[str, float, str], None]  # phase, fraction of the cell, detail


class Workshop:
    """What a worker keeps between cells: the model, and reward instances.

    Training and evaluation never share a reward instance, so that nothing a method does can reach a score.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.model = grid.model
        self.keep_images = grid.config.keep_images == "final"
        self.training_rewards = _training_rewards(grid)
        self.evaluator = Evaluator(
            self.model,
            grid.rewards,
            load_embedding(grid.source.family)(self.model.device),
            grid.evaluated,
            grid.config.evaluation,
            Generation(grid.config.sampler),
        )
        self._base: dict[Path, BaseReference] = {}

    def base_reference(self, cells: Path) -> BaseReference:
        """The base model on the pictures of curves, for the run whose cells are in this directory; made once."""
        if cells not in self._base:
            self._base[cells] = base_reference(self.evaluator, cells)
        return self._base[cells]


def _training_rewards(grid: Grid) -> dict[str, Reward]:
    names = [name for terms in grid.training_rewards.values() for _, name in terms]
    if all(arm.kind == "given" for arm in grid.arms.values()):  # nothing calls them, and their networks are large
        return {name: Declared(grid.rewards[name].reward) for name in names}
    return grid.build_training_rewards(names)
