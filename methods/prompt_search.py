"""Prompt search: try a fixed list of style suffixes on the prompt, keep the picture that the reward likes best.

    Input: prompt c, initial latent x_T, reward r, suffixes s_1 = "", s_2, ...
    for each s_j:  x^j = sample(theta_base, c + s_j, x_T)
    return the x^j with the largest r(x^j, c), the first of equals

Cost of a picture: a chain forward, a decode and a query for each suffix; nothing is trained.
Differs from Promptist (Hao et al. 2023) in: a fixed list instead of a language model trained by PPO to rewrite prompts;
it is the control that tells how much of a gain a few words give. The reward reads the prompt that was asked for.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field, field_validator

from harness.api import InferenceConfig, Request
from methods._selection import SelectionTuner

SUFFIXES = (
    "",
    ", highly detailed",
    ", digital painting",
    ", concept art",
    ", trending on artstation",
    ", sharp focus",
    ", cinematic lighting",
    ", 3d render",
)


class PromptSearchConfig(InferenceConfig):
    """Prompt search's settings."""

    suffixes: tuple[str, ...] = Field(
        SUFFIXES,
        min_length=1,
        description="Appended to the prompt as they are; the first is empty. This project's choice, in the manner of "
        "the words that Promptist adds.",
    )

    @field_validator("suffixes")
    @classmethod
    def _starts_with_the_plain_prompt(cls, suffixes: tuple[str, ...]) -> tuple[str, ...]:
        if suffixes[0] != "":
            raise ValueError("the first suffix must be empty, so that the plain prompt is among the candidates")
        if len(set(suffixes)) != len(suffixes):
            raise ValueError("suffixes repeat; name each once")
        return suffixes


class PromptSearch(SelectionTuner[PromptSearchConfig]):
    """Prompt search: the best of a fixed list of style suffixes by the reward."""

    version = "1"
    stochastic = False
    needs_reward_gradient = False
    Config = PromptSearchConfig

    @property
    def candidates(self) -> int:
        """One per suffix."""
        return len(self.config.suffixes)

    def candidate(self, request: Request, index: int) -> Request:
        """The same latent, told something else."""
        prompt = replace(request.prompt, text=request.prompt.text + self.config.suffixes[index])
        return replace(request, prompt=prompt)
