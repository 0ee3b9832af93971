"""The state of methods that remember nothing but their optimiser."""

from __future__ import annotations

from typing import Any

from harness.api import Optimizer, TrainedFineTuner


class OptimizerState(TrainedFineTuner):
    """A tuner whose only state, beyond the adapter, is its optimiser's."""

    optimizer: Optimizer

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's moments."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimiser's moments."""
        self.optimizer.load_state_dict(state["optimizer"])
