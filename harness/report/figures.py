"""All figures of a report, and their file names."""

from __future__ import annotations

from collections.abc import Callable
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


def draw(analysis: Analysis, write: Callable[[Drawn], None]) -> Figures:
    """Draw everything, and hand over each figure as soon as it is drawn; to be called inside `style.drawing`."""
    rewards = analysis.run.training_rewards

    def ready(figure: Drawn) -> Drawn:
        write(figure)
        return figure

    def known(figure: Drawn | None) -> Drawn | None:
        return None if figure is None else ready(figure)

    grids = {
        reward: picture_grid(analysis, reward, f"fig-05-pictures-{index}") for index, reward in enumerate(rewards, 1)
    }
    kept = {reward: ready(grid) for reward, grid in grids.items() if grid is not None}
    return Figures(
        ready(forest(analysis, "fig-01-forest")),
        known(learning_curves(analysis, "fig-02-curves")),
        known(heatmap(analysis, "fig-03-generalisation")),
        known(tradeoffs(analysis, "fig-04-tradeoffs")),
        tuple(kept.values()),
        tuple(kept),
        known(norms_figure(analysis.run.probes, analysis.run.arms, rewards[0], "fig-06-gradients")),
        known(variance_figure(analysis, "fig-10-variance")),
        known(differences(analysis, "fig-07-differences")),
        known(probabilities(analysis, "fig-08-probabilities")),
        known(profile(analysis, "fig-09-profile")),
    )
