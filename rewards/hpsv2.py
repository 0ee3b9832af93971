"""Human Preference Score v2 and v2.1: how well people would like a picture for its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from harness.api import ConfiguredReward, Prompt, RewardConfig, WeightFile
from rewards._clip import OpenClip, open_clip_library
from rewards._preprocessing import CLIP_MEAN, CLIP_STD, as_pictures, known, letterbox, normalised
from rewards._weights import read_config

REPO = "xswu/HPSv2"
WHERE = (
    f"Hugging Face {REPO} (Apache-2.0, 3.9 GB). Only its state_dict is read: 686 tensors of open_clip's ViT-H-14, "
    "unless a config.json beside it (open_clip's model configuration) says another architecture"
)


@final
class HPSConfig(RewardConfig):
    """Settings of `hpsv2` and `hpsv2.1`.

    Attributes:
        antialias: Filter pictures that are made smaller. The reference resizes tensors, which torchvision filters
            from 0.17 on and did not before, so figures published in 2023 were probably made without: 1e-4 to 1e-3 of
            difference on photos, 2e-2 on noise.
    """

    antialias: bool = True


@final
class _PreferenceScore:
    """The cosine of a fine-tuned ViT-H-14 between a letterboxed picture and its prompt."""

    def __init__(
        self, name: str, device: torch.device, config: HPSConfig, files: Mapping[str, Path], dtype: torch.dtype
    ) -> None:
        published = open_clip_library().get_model_config("ViT-H-14")
        self._clip = OpenClip(read_config(files.get("config.json"), published), files[name], device, dtype)
        self._antialias = config.antialias

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        images = letterbox(as_pictures(images_BCHW), self._clip.size, self._antialias)
        cosines = self._clip.cosines(normalised(images, CLIP_MEAN, CLIP_STD), [prompt.text for prompt in prompts])
        return known(cosines, images_BCHW)


def _files(name: str) -> tuple[WeightFile, ...]:
    return (WeightFile(name, REPO, where=WHERE), WeightFile("config.json", optional=True))


@final
class HPSv2(ConfiguredReward):
    """How well people would like the picture for its prompt: Human Preference Score v2.

    Formula: cos(image embedding, text embedding) of open_clip's ViT-H-14, fine-tuned on choices between pictures
    (HPDv2; Wu et al. 2023), as `hpsv2.score` with hps_version="v2.0"; published tables show 100 times that. Range:
    [-1, 1], typically 0.26 to 0.28 (Stable Diffusion 1.4: 0.2695 on average over the benchmark's four styles); larger
    is better. Comparable only for the same prompt, and not with v2.1.

    Pictures are made to fit into 224x224, bicubic, and padded with black, as the reference does on its tensors; prompts
    are cut after 77 tokens, and the empty one is scored. Weights: xswu/HPSv2, HPS_v2_compressed.pt (Apache-2.0).

    Raises:
        UserError: open_clip is not installed, or the weights do not fit.
    """

    name = "hpsv2"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "cos"
    family = "named"
    Config = HPSConfig

    @classmethod
    def files(cls, config: Any) -> tuple[WeightFile, ...]:
        """The checkpoint, and optionally its architecture."""
        return _files("HPS_v2_compressed.pt")

    def __init__(
        self, device: torch.device, config: Any, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        self._score = _PreferenceScore("HPS_v2_compressed.pt", device, config, files, dtype)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) in [-1, 1]; NaN where a picture is not finite. ValueError unless pictures are (B, 3, H, W)."""
        return self._score(images_BCHW, prompts)

    def applies(self, prompt: Prompt) -> bool:
        """Always: every text has an embedding."""
        return True


@final
class HPSv21(ConfiguredReward):
    """How well people would like the picture for its prompt: Human Preference Score v2.1.

    Formula: as `hpsv2`, with the weights that were trained on more and cleaner choices: `hpsv2.score` with
    hps_version="v2.1"; published tables show 100 times that. Range: [-1, 1], typically 0.24 to 0.30 (Stable Diffusion
    1.4: 0.2535 on average over the benchmark's four styles); larger is better. Comparable only for the same prompt, and
    not with v2. Weights: xswu/HPSv2, HPS_v2.1_compressed.pt (Apache-2.0).

    Raises:
        UserError: open_clip is not installed, or the weights do not fit.
    """

    name = "hpsv2.1"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "cos"
    family = "named"
    Config = HPSConfig

    @classmethod
    def files(cls, config: Any) -> tuple[WeightFile, ...]:
        """The checkpoint, and optionally its architecture."""
        return _files("HPS_v2.1_compressed.pt")

    def __init__(
        self, device: torch.device, config: Any, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        self._score = _PreferenceScore("HPS_v2.1_compressed.pt", device, config, files, dtype)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) in [-1, 1]; NaN where a picture is not finite. ValueError unless pictures are (B, 3, H, W)."""
        return self._score(images_BCHW, prompts)

    def applies(self, prompt: Prompt) -> bool:
        """Always: every text has an embedding."""
        return True
