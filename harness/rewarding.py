"""The contracts of rewards and embeddings: pictures and prompts in, numbers or vectors out.

Re-exported by `harness.api`, which plug-ins import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from harness.prompts import Prompt

Role = Literal["proxy", "held-out", "gold"]


class Reward(ABC):
    """Pictures and prompts in, one float per picture out; larger is better for every reward.

    Implementations are built by `Class(device)`, those with settings or weights as `ConfiguredReward` says. They set
    the class attributes, which `list rewards` shows.

    Attributes:
        name: On the command line; the file's name with dashes unless a file holds several.
        version: Bumped whenever its numbers change.
        differentiable: Whether a gradient reaches the pictures.
        role: `proxy` (may be trained on), `held-out` (another measure of the same thing, never trained on), `gold`
            (the truth as well as it can be measured; shares no weights with any reward).
        unit: Unit of the score, for axes and tables.
        family: `any`; or the model family that it makes sense on (`emoji`); or `named`: it scores only runs that name
            it, because it needs weights or packages of its own.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    differentiable: ClassVar[bool]
    role: ClassVar[Role]
    unit: ClassVar[str]
    family: ClassVar[str] = "any"

    @abstractmethod
    def __init__(self, device: torch.device) -> None:
        """Load what is needed onto `device`, once. Computes in float32."""

    @abstractmethod
    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,), float32, on the published scale, of pictures float (B, 3, H, W), nominally in [0, 1]."""

    @abstractmethod
    def applies(self, prompt: Prompt) -> bool:
        """Whether the score is defined for this prompt; where not, it is missing in records, not zero."""


class RewardConfig(BaseModel):
    """Base of a reward's `Config`: its settings, written in brackets after its name, as `classifier[target=goldfish]`.

    Frozen; unknown names are refused. Values arrive as YAML scalars.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class WeightFile:
    """A file that a reward needs, and where it comes from.

    Attributes:
        name: Its name: in a directory given with `--reward-weights`, and in the hub's repository.
        repo: Hub id (`owner/name`) of the published weights; "" where they are on no hub.
        revision: Commit of the hub's repository; "" takes the newest.
        sha256: Of the published file, where known; a file from the hub must have it.
        where: In words: where the file is published, and under which licence. Shown when it is missing.
        optional: Whether the reward also works without it (`config.json`: without it the published architecture).
    """

    name: str
    repo: str = ""
    revision: str = ""
    sha256: str = ""
    where: str = ""
    optional: bool = False


class ConfiguredReward(Reward):
    """A reward with settings, or with weights that are not in the repository.

    Built once per process and purpose: training and evaluation never share an instance. Built on the `meta` device it
    only checks: it reads the names and shapes of what the files hold, and raises what would be wrong.

    Attributes:
        Config: Its settings.
    """

    Config: ClassVar[type[RewardConfig]]

    @classmethod
    @abstractmethod
    def files(cls, config: Any) -> tuple[WeightFile, ...]:
        """What it needs with these settings, the file that `--reward-weights NAME=FILE` stands for first."""

    @abstractmethod
    def __init__(
        self, device: torch.device, config: Any, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        """Load onto `device`.

        Args:
            device: Where to compute; `meta`: check the files only.
            config: A `Config`.
            files: By `WeightFile.name`: where each one is. Optional ones may be absent.
            dtype: Of the network: float32, or bfloat16 as an option of training; preprocessing and the last steps
                of the score are float32 in any case. float64 where tests ask for it.

        Raises:
            UserError: A file does not hold what is expected (which names and shapes, and where to get it).
        """


class Embedding(ABC):
    """Pictures to vectors, for diversity and drift; never trained on. Found in rewards/, as rewards are.

    Attributes:
        name: Shown in reports.
        version: Bumped whenever its numbers change.
        family: `any`, or the model family that it was made for.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    family: ClassVar[str] = "any"

    @abstractmethod
    def __init__(self, device: torch.device) -> None:
        """Load what is needed onto `device`, once."""

    @abstractmethod
    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Vectors (B, D), float32, of pictures in [0, 1]; compared by their cosine."""
