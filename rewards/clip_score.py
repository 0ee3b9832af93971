"""CLIP score: how well a picture fits its prompt, by one of the dual encoders that open_clip publishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from harness.api import ConfiguredReward, Prompt, RewardConfig, UserError, WeightFile
from rewards._clip import OpenClip, open_clip_library
from rewards._preprocessing import CLIP_MEAN, CLIP_STD, as_pictures, known, normalised, resize_shortest_side_and_crop
from rewards._weights import read_config

CONFIG = "open_clip_config.json"


@final
class CLIPScoreConfig(RewardConfig):
    """Settings of `clip-score`.

    Attributes:
        model: Name of the architecture in open_clip (`open_clip.list_models()`); the default is OpenAI's ViT-L/14.
        pretrained: Name of the weights in open_clip (`open_clip.list_pretrained()`): where they are published and how
            pictures are normalised for them.
    """

    model: str = "ViT-L-14-quickgelu"
    pretrained: str = "openai"


@final
class CLIPScore(ConfiguredReward):
    """How well the picture fits its prompt, by a CLIP of your choice.

    Formula: 100 * cos(image embedding, text embedding), negative values kept. Range: [-100, 100], with the default,
    OpenAI's ViT-L/14, typically 20 to 30; larger is better. Comparable only for the same model and weights.

    Pictures are resized so that the shorter side is the model's (224), bicubic and antialiased, the middle square is
    cut as torchvision does, and normalised as published with the weights. Prompts go through open_clip's tokenizer, are
    cut after 77 tokens, and the empty one is scored. Weights: those that open_clip publishes under the two settings
    (OpenAI's: MIT), or any file of that architecture; an open_clip_config.json beside it, as published with open_clip
    weights, says another architecture and normalisation.

    Raises:
        UserError: open_clip is not installed or does not publish what the settings name, the model has another
            tokenizer or preprocessing than CLIP, or the weights do not fit.
    """

    name = "clip-score"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "100 cos"
    family = "named"
    Config = CLIPScoreConfig

    @classmethod
    def files(cls, config: Any) -> tuple[WeightFile, ...]:
        """The weights, and optionally their architecture."""
        published = _published(config)
        repo, _, name = published["hf_hub"].rpartition("/")
        places = " or ".join(filter(None, [f"Hugging Face {repo}" if repo else "", published["url"]]))
        return (
            WeightFile(
                name or "open_clip_model.safetensors",
                repo,
                where=f"{places}: the weights {config.pretrained} of {config.model} in open_clip",
            ),
            WeightFile(CONFIG, optional=True),
        )

    def __init__(
        self, device: torch.device, config: Any, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        if CONFIG in files:
            content = read_config(files[CONFIG], {})
            architecture, preprocessing = content.get("model_cfg", {}), content.get("preprocess_cfg", {})
        else:
            preprocessing = _published(config)
            architecture = open_clip_library().get_model_config(config.model)
            if preprocessing.get("quick_gelu", False) != architecture.get("quick_gelu", False):
                raise UserError(
                    f"clip-score: the weights {config.pretrained} and the architecture {config.model} differ in their "
                    "GELU; add -quickgelu to the name of the architecture, or leave it out"
                )
        resizing = preprocessing.get("resize_mode", "shortest"), preprocessing.get("interpolation", "bicubic")
        if resizing != ("shortest", "bicubic"):
            raise UserError(
                f"clip-score: {config.model} with {config.pretrained} resizes pictures in another way than CLIP, which "
                "is not supported"
            )
        self._mean, self._std = preprocessing.get("mean", CLIP_MEAN), preprocessing.get("std", CLIP_STD)
        self._clip = OpenClip(architecture, files[self.files(config)[0].name], device, dtype)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) in [-100, 100]; NaN where a picture is not finite. ValueError unless they are (B, 3, H, W)."""
        images = resize_shortest_side_and_crop(as_pictures(images_BCHW), self._clip.size)
        pixels = normalised(images, self._mean, self._std)
        return known(100 * self._clip.cosines(pixels, [prompt.text for prompt in prompts]), images_BCHW)

    def applies(self, prompt: Prompt) -> bool:
        """Always: every text has an embedding."""
        return True


def _published(config: CLIPScoreConfig) -> dict[str, Any]:
    """What open_clip says about the weights: `hf_hub`, `url`, `mean`, `std`, `resize_mode`, `interpolation`."""
    library = open_clip_library()
    found: dict[str, Any] = library.get_pretrained_cfg(config.model, config.pretrained)
    if not found:
        tags = ", ".join(library.list_pretrained_tags_by_model(config.model))
        raise UserError(
            f"clip-score: open_clip publishes no weights {config.pretrained!r} of a model {config.model!r}; "
            + (f"it has {tags}" if tags else "see open_clip.list_pretrained()")
        )
    return found
