"""All figures of a report, and their file names."""

from __future__ import annotations

from dataclasses import dataclass

from harness.report.analysis import Analysis
from harness.report.captions import Drawn
from harness.report.differences import differences, probabilities, profile
from harness.report.forest import forest
from harness.report.gradients import norms_figure
from harness.report.heatmap import heatmap
from harness.report.learning_curves import learning_curves
from harness.report.pictures import picture_grid
from harness.report.tradeoffs import tradeoffs
from harness.report.variance import variance_figure


@dataclass(frozen=True, eq=False)
class Figures:
    """What could be drawn; None where records have nothing for it.

    Attributes:
        pictures: One grid per training reward with pictures. ``pictured``: these rewards.
    """

    forest: Drawn
    curves: Drawn | None
    matrix: Drawn | None
    tradeoffs: Drawn | None
    pictures: tuple[Drawn, ...]
    pictured: tuple[str, ...]
    gradients: Drawn | None
    variance: Drawn | None
    differences: Drawn | None
    probabilities: Drawn | None
    profile: Drawn | None

    @property
    def every(self) -> tuple[Drawn, ...]:
        """All figures there are."""
        single = (self.forest, self.curves, self.matrix, self.tradeoffs, self.gradients, self.variance)
        pairs = (self.differences, self.probabilities, self.profile)
        return (*(figure for figure in (*single, *pairs) if figure is not None), *self.pictures)


def draw(analysis: Analysis) -> Figures:
    """Draw everything; to be called inside `style.drawing`."""
    rewards = analysis.run.training_rewards
    grids = {
        reward: picture_grid(analysis, reward, f"fig-05-pictures-{index}") for index, reward in enumerate(rewards, 1)
    }
    kept = {reward: grid for reward, grid in grids.items() if grid is not None}
    return Figures(
        forest(analysis, "fig-01-forest"),
        learning_curves(analysis, "fig-02-curves"),
        heatmap(analysis, "fig-03-generalisation"),
        tradeoffs(analysis, "fig-04-tradeoffs"),
        tuple(kept.values()),
        tuple(kept),
        norms_figure(analysis.run.probes, analysis.run.arms, rewards[0], "fig-06-gradients"),
        variance_figure(analysis, "fig-10-variance"),
        differences(analysis, "fig-07-differences"),
        probabilities(analysis, "fig-08-probabilities"),
        profile(analysis, "fig-09-profile"),
    )
