"""LAION's aesthetic predictors: how people would rate a picture, whatever its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from harness.api import ConfiguredReward, Prompt, RewardConfig, WeightFile
from rewards._clip import clip_config, clip_state, unit
from rewards._preprocessing import CLIP_MEAN, CLIP_STD, as_pictures, known, normalised, resize_shortest_side_and_crop
from rewards._weights import build_strictly, read_state

HEAD_V2 = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_V1 = "sa_0_4_vit_l_14_linear.pth"
# Of openai/clip-vit-large-patch14, as transformers describes it; its text encoder is not read.
VIT_L_14 = {
    "projection_dim": 768,
    "text_config": {},
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    },
}


def _head_v2(width: int) -> nn.Module:
    """Published as a network of five layers, though nothing but dropout stands between them."""
    sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
    return nn.ModuleDict({"layers": nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})})


def _head_v1(width: int) -> nn.Module:
    return nn.Linear(width, 1)


@final
class _Predictor:
    """A linear function of the unit embedding of a picture.

    Args:
        build_head: From the width of an embedding to linear layers, which follow each other.
        head: File of the head's weights.
        files: The CLIP's weights, and optionally its architecture.
        device: Where to compute; `meta`: check the files only.
        dtype: Of the CLIP; the head is float32 at least.
    """

    def __init__(
        self,
        build_head: Callable[[int], nn.Module],
        head: Path,
        files: Mapping[str, Path],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        from transformers import CLIPVisionModelWithProjection

        config = clip_config(files.get("config.json"), VIT_L_14)
        vision = config.vision_config
        vision.projection_dim = config.projection_dim
        state = read_state(head)
        layers = build_strictly(
            lambda: build_head(vision.projection_dim), state, head, torch.device("cpu"), torch.float64
        )
        weights = files["model.safetensors"]
        seeing = {
            name: tensor
            for name, tensor in clip_state(weights).items()
            if name.startswith(("vision_model.", "visual_projection."))
        }
        self._network: Any = build_strictly(
            lambda: CLIPVisionModelWithProjection(vision), seeing, weights, device, dtype
        )
        self._size: int = vision.image_size
        self._dtype = dtype
        weight, bias = _collapsed(layers)
        precision = torch.promote_types(dtype, torch.float32)
        self._weight, self._bias = weight.to(device, precision), bias.to(device, precision)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        images = resize_shortest_side_and_crop(as_pictures(images_BCHW), self._size)
        pixels = normalised(images, CLIP_MEAN, CLIP_STD).to(self._dtype)
        seen = unit(self._network(pixel_values=pixels).image_embeds)
        return known((seen * self._weight).sum(-1) + self._bias, images_BCHW)


def _collapsed(layers: nn.Module) -> tuple[Tensor, Tensor]:
    """The one linear function, weight (D,) and bias (), that a chain of linear layers is; float64 as the layers."""
    weight, bias = torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for layer in reversed([module for module in layers.modules() if isinstance(module, nn.Linear)]):
        bias = bias + (weight * layer.bias).sum()
        weight = weight @ layer.weight
    return weight, bias


def _files(head: WeightFile) -> tuple[WeightFile, ...]:
    where = (
        "Hugging Face openai/clip-vit-large-patch14 (1.7 GB; code MIT, licence of the weights: see the model card); "
        "its text encoder is not read. A config.json beside it (of transformers' CLIPModel) says another architecture"
    )
    return (
        head,
        WeightFile("model.safetensors", "openai/clip-vit-large-patch14", where=where),
        WeightFile("config.json", optional=True),
    )


@final
class Aesthetic(ConfiguredReward):
    """How people would rate the picture from 1 to 10: LAION's aesthetic predictor v2 (sac+logos+ava1, linear MSE).

    Formula: w . e + b, with e the L2-normalised image embedding (768) of OpenAI's CLIP ViT-L/14 (quick GELU). The
    published head is a network of five layers without activations, so it is this linear function; w has norm 18 and b
    is 5.24. Range: nominally 1 to 10 (the training ratings), in practice 3 to 8, typically 5 to 6; larger is better.
    The prompt is not read.

    Pictures are resized so that the shorter side is 224, bicubic and antialiased, and the middle square is cut, as
    torchvision does. Weights: the head from github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0),
    the CLIP from openai/clip-vit-large-patch14 in transformers' layout.

    Raises:
        UserError: The weights do not fit.
    """

    name = "aesthetic"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "rating"
    family = "named"
    Config = RewardConfig

    @classmethod
    def files(cls, config: Any) -> tuple[WeightFile, ...]:
        """The head, the CLIP, and optionally the CLIP's architecture."""
        return _files(
            WeightFile(
                HEAD_V2,
                sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                where="github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0, 3.7 MB)",
            )
        )

    def __init__(
        self, device: torch.device, config: Any, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        self._predictor = _Predictor(_head_v2, files[HEAD_V2], files, device, dtype)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,); NaN where a picture is not finite. ValueError unless pictures are (B, 3, H, W)."""
        return self._predictor(images_BCHW)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


@final
class AestheticV1(ConfiguredReward):
    """How people would rate the picture from 1 to 10: LAION's aesthetic predictor v1 (trained on SAC).

    Formula: w . e + b, with e the L2-normalised image embedding (768) of OpenAI's CLIP ViT-L/14 (quick GELU) and one
    published linear layer. Range: nominally 1 to 10 (the training ratings); larger is better. Not comparable with
    `aesthetic`. Pictures and prompts as there. Weights: the head from github.com/LAION-AI/aesthetic-predictor (MIT),
    the CLIP from openai/clip-vit-large-patch14 in transformers' layout.

    Raises:
        UserError: The weights do not fit.
    """

    name = "aesthetic-v1"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "rating"
    family = "named"
    Config = RewardConfig

    @classmethod
    def files(cls, config: Any) -> tuple[WeightFile, ...]:
        """The head, the CLIP, and optionally the CLIP's architecture."""
        return _files(WeightFile(HEAD_V1, where="github.com/LAION-AI/aesthetic-predictor (MIT)"))

    def __init__(
        self, device: torch.device, config: Any, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        self._predictor = _Predictor(_head_v1, files[HEAD_V1], files, device, dtype)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,); NaN where a picture is not finite. ValueError unless pictures are (B, 3, H, W)."""
        return self._predictor(images_BCHW)

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True
