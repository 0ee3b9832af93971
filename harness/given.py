"""Arms that were made elsewhere: an adapter, or a folder of pictures, judged as trained arms are.

They are no plug-ins: `python -m harness evaluate` makes arms of them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, final

import numpy as np
from pydantic import Field, computed_field, field_validator
from torch import Tensor

from harness.api import (
    Context,
    Cost,
    CostRange,
    DiffusionModel,
    Generation,
    InferenceConfig,
    InferenceFineTuner,
    Prompt,
    Request,
    Reward,
    UserError,
)
from harness.evaluation import Evaluated, Pictures
from harness.pictures import load_picture, read_pictures
from harness.sampling import generate


class GivenConfig(InferenceConfig):
    """What was made elsewhere; identified by its content, not by where it lies."""

    path: Path = Field(exclude=True, description="Where it is.")

    @field_validator("path")
    @classmethod
    def _exists(cls, path: Path) -> Path:
        if not path.exists():
            raise ValueError("does not exist; give a file or a directory")
        return path

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def sha256(self) -> str:
        """Of the names and contents of the files."""
        files = sorted(p for p in self.path.rglob("*") if p.is_file()) if self.path.is_dir() else [self.path]
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(self.path) if self.path.is_dir() else file.suffix}\n".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


class GivenAdapterConfig(GivenConfig):
    """Of `given-adapter`."""

    scale: float = Field(1.0, allow_inf_nan=False, description="Strength of the adapter.")


class GivenPicturesConfig(GivenConfig):
    """Of `given-pictures`."""

    prompts: Path | None = Field(None, exclude=True, description="File that says which prompt each picture is of.")

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def prompts_sha256(self) -> str | None:
        """Of the prompts: another assignment is another arm."""
        if self.prompts is None or not self.prompts.is_file():  # refused when the pictures are looked for
            return None
        return hashlib.sha256(self.prompts.read_bytes()).hexdigest()


class Given(InferenceFineTuner):
    """What this run neither trains nor generates by spending queries."""

    version: ClassVar[str] = "1"
    stochastic: ClassVar[bool] = False
    needs_reward_gradient: ClassVar[bool] = False


@final
class GivenAdapter(Given):
    """An adapter made elsewhere, at a strength, with the run's sampler."""

    Config = GivenAdapterConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: GivenAdapterConfig, context: Context) -> None:
        self.model, self.scale, self.sampler = model, config.scale, context.sampler
        model.load_adapter(config.path)

    def planned_cost(self) -> CostRange:
        """One chain of the run's sampler."""
        rows = self.sampler.steps * self.model.rows_per_latent(self.sampler.guidance)
        return CostRange(Cost(forward_rows=rows), Cost(forward_rows=rows))

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """The shared sampler with the adapter at its strength."""
        scaled = Generation(generation.sampler, generation.lora_scale * self.scale, generation.lora_steps)
        return generate(self.model, requests, scaled)


@final
class GivenPictures(Given):
    """Pictures made elsewhere."""

    Config = GivenPicturesConfig

    def __init__(self, model: DiffusionModel, reward: Reward, config: GivenPicturesConfig, context: Context) -> None:
        self.config = config

    def planned_cost(self) -> CostRange:
        """Nothing is computed."""
        return CostRange(Cost(), Cost())

    def generate(self, requests: Sequence[Request], generation: Generation) -> Tensor:
        """Never called: there are pictures already."""
        raise AssertionError("given pictures are not generated")

    def files(self, prompts: Sequence[Prompt], number: int) -> dict[str, list[Path]]:
        """The first `number` pictures of each prompt by its text, in the order of file names.

        Raises:
            UserError: A prompt has too few.
        """
        by_text: dict[str, list[Path]] = defaultdict(list)
        for picture in read_pictures([self.config.path], self.config.prompts):
            by_text[picture.prompt.text].append(picture.path)
        lacking = [prompt.text for prompt in prompts if len(by_text[prompt.text]) < number]
        if lacking:
            raise UserError(
                f"{self.config.path} has fewer than {number} pictures of {len(lacking)} of the {len(prompts)} prompts "
                f"that are evaluated, as of {lacking[0]!r}; the prompts file must name them with the suite's text "
                "(--suite and --eval-latents say which and how many)"
            )
        return {prompt.text: by_text[prompt.text][:number] for prompt in prompts}

    def pictures(self, evaluated: Sequence[Evaluated]) -> Pictures:
        """8-bit pictures (N, H, W, 3): the k-th of a prompt stands for its noise id k. `check` has seen them."""
        number = 1 + max(item.request.noise_id for item in evaluated)
        files = self.files([item.request.prompt for item in evaluated], number)
        return np.stack([load_picture(files[i.request.prompt.text][i.request.noise_id]) for i in evaluated])

    def check(self, prompts: Sequence[Prompt], number: int) -> None:
        """Whether `pictures` will find what it needs.

        Raises:
            UserError: A prompt has too few, one cannot be read, or sizes differ.
        """
        files = self.files(prompts, number)
        if len(sizes := {load_picture(path).shape for paths in files.values() for path in paths}) > 1:
            shown = ", ".join(f"{width}x{height}" for height, width, _ in sorted(sizes)[:3])
            raise UserError(f"the pictures in {self.config.path} have several sizes ({shown}); bring them to one")


GIVEN: dict[str, type[Given]] = {"given-adapter": GivenAdapter, "given-pictures": GivenPictures}
