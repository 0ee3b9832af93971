"""Early stopping as a variant: the adapter of the curve point that validation prompts like best.

Training goes on to the end of the budget, so that one training shows the result with and without it. Its judges are
rewards or metrics of the evaluation on prompts that neither training nor results use; the queries that judging takes
are counted where the variant's are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import torch

from harness.api import Prompt, UserError
from harness.config import EarlyStoppingConfig
from harness.evaluation import Evaluated, Evaluator, noise_bank
from harness.grid import parse_reward
from harness.metering import Generate
from harness.records import score_rows

DIRECTORY = "adapter-best"  # of a cell, for diffusers' load_lora_weights


def refuse_trained(reward: str, trained: Sequence[str]) -> None:
    """Refuse to keep the best checkpoint by what is trained on: its best is the last one, however over-optimised.

    Raises:
        UserError: The judge and a training reward share a component.
    """
    names = {name for expression in trained for _, name in parse_reward(expression)}
    for _, name in parse_reward(reward):
        if name in names:
            raise UserError(
                f"--keep-best {name}: that is trained on, so that over-optimisation looks like progress to it; "
                "take a held-out reward or a gold metric (`python -m harness list rewards`); who means it sets "
                "early_stopping.reward"
            )


class EarlyStopping:
    """What has been best so far in one cell.

    Args:
        evaluator: Of the run.
        config: The judge, and on how many pictures.
        prompts: The validation split.
    """

    def __init__(self, evaluator: Evaluator, config: EarlyStoppingConfig, prompts: Sequence[Prompt]) -> None:
        self._evaluator, self._reward = evaluator, config.reward
        self._terms = parse_reward(config.reward)
        self._evaluated = [
            Evaluated("validation", noise_bank(evaluator.model, prompt, noise_id))
            for prompt in prompts[: config.prompts]
            for noise_id in range(config.latents)
        ]
        self._queries = 0.0
        self._rows: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}

    def consider(
        self,
        generate: Generate,
        adapter: Mapping[str, torch.Tensor],
        identity: Mapping[str, Any],
        position: Mapping[str, Any],
        point: str,
    ) -> None:
        """Judge the model as it is now, and keep its adapter if it is the best yet; a known point is left alone.

        Args:
            generate: The method's generation of pictures.
            adapter: A copy of the adapter's parameters.
            identity: The cell's.
            position: Where its training stands.
            point: Of the curve, for the records.
        """
        if any(row["point"] == point for row in self._rows):
            return
        pictures, _ = self._evaluator.pictures(generate, [e.request for e in self._evaluated])
        names = list(dict.fromkeys(name for _, name in self._terms))
        scores = self._evaluator.score(pictures, self._evaluated, names)
        for name in names:
            if not any(score.reward == name for score in scores):
                raise UserError(
                    f"{name} applies to none of the {len(self._evaluated)} validation pictures that early stopping "
                    "judges; judge by another reward, or by more prompts (--set early_stopping.prompts=32)"
                )
        self._queries += len(scores)
        self._rows += score_rows(identity, position, point, scores)
        means = {name: [s.score for s in scores if s.reward == name] for name in names}
        value = sum(weight * sum(means[name]) / max(1, len(means[name])) for weight, name in self._terms)
        # Any number beats what is none; a comparison with NaN would keep the first point for ever.
        if not self.best or value > self.best["value"] or (isfinite(value) and not isfinite(self.best["value"])):
            queries = position["queries"] + self._queries
            self.best = {"value": value, "adapter": dict(adapter), "position": {**position, "queries": queries}}

    @property
    def kept(self) -> dict[str, Any]:
        """Which point is the best so far, for status.json."""
        iteration = self.best["position"]["iteration"]
        point = next(str(row["point"]) for row in self._rows if row["iteration"] == iteration)
        return {"reward": self._reward, "point": point, "value": self.best["value"], "adapter": DIRECTORY}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Scores of the validation prompts, for scores.parquet."""
        return self._rows

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"queries": self._queries, "rows": self._rows, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._queries, self._rows, self.best = state["queries"], state["rows"], state["best"]
