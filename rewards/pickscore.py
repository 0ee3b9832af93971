"""PickScore: which picture the users of Pick-a-Pic would choose for a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from harness.api import ConfiguredReward, Prompt, RewardConfig, WeightFile
from rewards._clip import TOKENS, Texts, clip_config, clip_state, open_clip_library, unit
from rewards._preprocessing import CLIP_MEAN, CLIP_STD, as_pictures, known, normalised, resize_shortest_side_and_crop
from rewards._weights import build_strictly

# laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which was fine-tuned, as transformers describes it.
VIT_H_14 = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}


@final
class PickScore(ConfiguredReward):
    """Which picture the users of Pick-a-Pic would choose for the prompt: PickScore v1.

    Formula: exp(logit_scale) * cos(image embedding, text embedding) of a CLIP ViT-H/14 fine-tuned on choices between
    pictures (Kirstain et al. 2023); exp(logit_scale) is 100 in the published weights. Range: [-100, 100], typically
    20 to 23; larger is better. A difference d for one prompt is a choice probability of 1 / (1 + exp(-d)).

    Pictures are resized so that the shorter side is 224, bicubic and antialiased, and the middle square is cut, its
    offset rounded down as in transformers. Texts go through CLIP's tokenizer as transformers has it, which unlike
    open_clip's repairs neither Unicode nor HTML entities; they are cut after 77 tokens, end mark included, and the
    empty one is scored. Weights: yuvalkirstain/PickScore_v1 in transformers' CLIPModel layout (code MIT; for the
    weights see the model card).

    Raises:
        UserError: open_clip is not installed (its vocabulary is read), or the weights do not fit.
    """

    name = "pickscore"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "100 cos"
    family = "named"
    Config = RewardConfig

    @classmethod
    def files(cls, config: Any) -> tuple[WeightFile, ...]:
        """The checkpoint, and optionally its architecture."""
        where = (
            "Hugging Face yuvalkirstain/PickScore_v1, also as pytorch_model.bin (3.9 GB; licence: see the model card). "
            "A config.json beside it (of transformers' CLIPModel) says another architecture"
        )
        return (
            WeightFile("model.safetensors", "yuvalkirstain/PickScore_v1", where=where),
            WeightFile("config.json", optional=True),
        )

    def __init__(
        self, device: torch.device, config: Any, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import CLIPModel

        weights = files["model.safetensors"]
        architecture = clip_config(files.get("config.json"), VIT_H_14)
        state = clip_state(weights)
        self._network: Any = build_strictly(lambda: CLIPModel(architecture), state, weights, device, dtype)
        # From the file: in bfloat16 its exponential would be off by a percent.
        self._scale = float(state["logit_scale"].double().exp())
        self._size: int = architecture.vision_config.image_size
        self._dtype = dtype
        self._device = device
        self._tokenizer = _tokenizer()
        self._texts = Texts(self._embed)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,); NaN where a picture is not finite. ValueError unless pictures are (B, 3, H, W)."""
        images = resize_shortest_side_and_crop(as_pictures(images_BCHW), self._size, crop="floor")
        texts_BD = self._texts([prompt.text for prompt in prompts], len(images))
        pixels = normalised(images, CLIP_MEAN, CLIP_STD).to(self._dtype)
        seen = self._network.visual_projection(self._network.vision_model(pixel_values=pixels).pooler_output)
        return known(self._scale * (unit(seen) * texts_BD).sum(-1), images_BCHW)

    def applies(self, prompt: Prompt) -> bool:
        """Always: every text has an embedding."""
        return True

    def _embed(self, text: str) -> Tensor:
        tokens = self._tokenizer(text, truncation=True, max_length=TOKENS, return_tensors="pt")["input_ids"]
        read = self._network.text_model(input_ids=tokens.to(self._device)).pooler_output
        embedding: Tensor = self._network.text_projection(read)
        return embedding


def _tokenizer() -> Any:
    """CLIP's tokenizer as transformers has it, from the vocabulary that open_clip ships."""
    from transformers import CLIPTokenizer

    shipped = open_clip_library().SimpleTokenizer()
    # The two marks alone are spelled differently.
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {marks.get(token, token): index for token, index in shipped.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(shipped.bpe_ranks))
