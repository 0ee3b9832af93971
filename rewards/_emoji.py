"""What the rewards of the embedded emoji model share: their critics' weights, and how a picture reaches them.

A critic is a folder under `models/emoji/critics/` in the layout of transformers (`config.json`, `model.safetensors`;
a CLIP is two, `image` and `text`, the latter with a tokenizer). It sees pictures of 64x64; others are resized,
bilinear and antialiased.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from harness.api import UserError
from rewards._preprocessing import known

EMOJI = Path(__file__).parents[1] / "models" / "emoji"
SIZE = 64
CAPTION_TOKENS = 24


def vocabulary() -> dict[str, Any]:
    """`models/emoji/vocabulary.json`: names, styles and colours of the embedded model."""
    content: dict[str, Any] = json.loads((EMOJI / "vocabulary.json").read_text(encoding="utf-8"))
    return content


def resized(images_BCHW: Tensor) -> Tensor:
    """The pictures as float32 (B, 3, 64, 64)."""
    images = images_BCHW.float()
    if images.shape[-2:] == (SIZE, SIZE):
        return images
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)


def load(critic: str, device: torch.device) -> Any:
    """The frozen network of `models/emoji/critics/<critic>` in float32, by the class that its config names."""
    import transformers  # takes seconds

    folder = _folder(critic)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    logging = transformers.utils.logging
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network = getattr(transformers, config["architectures"][0]).from_pretrained(folder, local_files_only=True)
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    return network.to(device, torch.float32).eval().requires_grad_(False)


def pixel_values(network: Any, images_BCHW: Tensor) -> Tensor:
    """What the network takes: 64x64, normalised by the mean and deviation of its config."""
    images = resized(images_BCHW)
    mean = images.new_tensor(network.config.image_mean).view(1, 3, 1, 1)
    deviation = images.new_tensor(network.config.image_std).view(1, 3, 1, 1)
    return ((images - mean) / deviation).contiguous(memory_format=torch.channels_last)


def logits(network: Any, images_BCHW: Tensor) -> Tensor:
    """A classifier's logits, float32 (B, classes)."""
    result: Tensor = network(pixel_values=pixel_values(network, images_BCHW)).logits
    return result


class ClipCritic:
    """100 * cosine between a picture and a text, by one of the two small CLIPs.

    Args:
        critic: Folder under `models/emoji/critics/`.
        device: Where the network lives.
    """

    def __init__(self, critic: str, device: torch.device) -> None:
        from transformers import CLIPTokenizer

        self._network = load(f"{critic}/image", device)
        self._reader = load(f"{critic}/text", device)
        self._tokenizer = CLIPTokenizer.from_pretrained(_folder(f"{critic}/text"), local_files_only=True)
        self._device = device
        self._texts: dict[str, Tensor] = {}

    def __call__(self, images_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores (B,) in [-100, 100]; NaN where a picture is not finite."""
        if len(texts) != len(images_BCHW):
            raise ValueError(f"{len(images_BCHW)} pictures, but {len(texts)} prompts")
        return known(100 * (self.pictures(images_BCHW) * self._embedded(texts)).sum(-1), images_BCHW)

    def pictures(self, images_BCHW: Tensor) -> Tensor:
        """Unit embeddings of the pictures (B, D)."""
        return F.normalize(logits(self._network, images_BCHW), dim=-1)

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings of the texts (B, D), each computed once."""
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                encoded = self._tokenizer(
                    text, padding="max_length", truncation=True, max_length=CAPTION_TOKENS, return_tensors="pt"
                )
                embedded = self._reader(input_ids=encoded["input_ids"].to(self._device)).text_embeds
                self._texts[text] = F.normalize(embedded, dim=-1)[0]
        return torch.stack([self._texts[text] for text in texts])


class StyleCritic:
    """Log-odds that a picture is in the 3D style, log p - log (1 - p), by one of the two style classifiers.

    Args:
        critic: Folder under `models/emoji/critics/`.
        device: Where the network lives.
    """

    def __init__(self, critic: str, device: torch.device) -> None:
        self._network = load(critic, device)
        self._index = int(self._network.config.label2id["3d"])

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Scores (B,) in natural-log units; NaN where a picture is not finite."""
        values = logits(self._network, images_BCHW)
        others = torch.cat([values[:, : self._index], values[:, self._index + 1 :]], 1)
        return known(values[:, self._index] - others.logsumexp(1), images_BCHW)


def _folder(critic: str) -> Path:
    folder = EMOJI / "critics" / critic
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {' and '.join(missing)}: restore the folder from the repository (`git checkout`), "
            "or train the critics as models/emoji/critics.py describes"
        )
    return folder
