"""What the rewards on CLIP models share: dual encoders of open_clip, layouts of transformers, cached texts.

Embeddings are float32 unit vectors whatever the network's dtype (float64 of a float64 network): in bfloat16 a cosine
near 0.27 would come in steps of 0.002.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from harness.api import UserError
from rewards._weights import build_strictly, read_config, read_state

TOKENS = 77  # context of every CLIP here


def open_clip_library() -> Any:
    """The package open_clip; importing it takes seconds.

    Raises:
        UserError: It is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"rewards on CLIP models need open_clip_torch ({error}): pip install 'draft-bench[rewards]'"
        ) from None
    return open_clip


def clip_config(path: Path | None, default: Mapping[str, Any]) -> Any:
    """A `CLIPConfig` of transformers: that of a `config.json`, or the published one.

    Raises:
        UserError: The file is no such configuration.
    """
    from transformers import CLIPConfig

    content = read_config(path, default)
    if not {"text_config", "vision_config", "projection_dim"} <= set(content):
        raise UserError(
            f"{path} is no configuration of a transformers CLIPModel: it lacks text_config, vision_config or "
            "projection_dim. Beside these weights a config.json says their architecture; without one it is the "
            "published one"
        )
    try:
        return CLIPConfig(**content)
    except Exception as error:  # its validators raise many kinds
        raise UserError(f"{path} is no configuration of a transformers CLIPModel: {error}") from None


def clip_state(path: Path) -> dict[str, Tensor]:
    """The weights of a transformers CLIPModel, without the position indices that versions before 4.31 stored."""
    return {name: tensor for name, tensor in read_state(path).items() if not name.endswith(".position_ids")}


def unit(embeddings_BD: Tensor) -> Tensor:
    """Unit vectors, in float32 at least."""
    return F.normalize(embeddings_BD if embeddings_BD.dtype == torch.float64 else embeddings_BD.float(), dim=-1)


@final
class Texts:
    """Unit embeddings of texts, each computed once and alone, so that none depends on what it is asked with.

    Args:
        embed: From one text to its embedding (1, D).
    """

    def __init__(self, embed: Callable[[str], Tensor]) -> None:
        self._embed = embed
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], pictures: int) -> Tensor:
        """Embeddings (B, D), without gradient.

        Raises:
            ValueError: There are not as many texts as pictures.
        """
        if len(texts) != pictures:
            raise ValueError(f"{pictures} pictures, but {len(texts)} prompts")
        for text in dict.fromkeys(texts):
            if text not in self._known:
                self._known[text] = unit(self._embed(text))[0]
        return torch.stack([self._known[text] for text in texts])


@final
class OpenClip:
    """A frozen dual encoder of open_clip with open_clip's own tokenizer.

    The tokenizer repairs broken Unicode and HTML entities, lowers the case, and cuts after 77 tokens, end mark
    included; the empty text is its two marks.

    Args:
        architecture: open_clip's model configuration (`embed_dim`, `vision_cfg`, `text_cfg` ...).
        weights: File of its state_dict.
        device: Where to compute; `meta`: check the file only.
        dtype: Of the network.

    Attributes:
        size: Side of the square pictures that it takes.

    Raises:
        UserError: open_clip is missing, does not know the architecture, or takes its tokenizer from the hub; or the
            weights do not fit.
    """

    def __init__(
        self, architecture: Mapping[str, Any], weights: Path, device: torch.device, dtype: torch.dtype
    ) -> None:
        library = open_clip_library()
        config = copy.deepcopy(dict(architecture))
        text, vision = config.get("text_cfg"), config.get("vision_cfg")
        if not isinstance(text, dict) or not isinstance(vision, dict):
            raise UserError(
                f"the architecture beside {weights} is none of open_clip: it lacks text_cfg or vision_cfg; without a "
                "configuration beside the weights the published one is meant"
            )
        if {"hf_model_name", "hf_tokenizer_name"} & set(text) or "multimodal_cfg" in config:
            raise UserError(
                "this model of open_clip has a text encoder or a tokenizer of its own, which is not supported; choose "
                "one with CLIP's tokenizer, such as ViT-L-14 or ViT-B-32"
            )
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False  # or it would download
        kind = library.CustomTextCLIP if config.pop("custom_text", False) else library.CLIP

        def build() -> nn.Module:
            try:
                made: nn.Module = kind(**config)
            except TypeError as error:
                raise UserError(f"the architecture beside {weights} is none of open_clip: {error}") from None
            return made

        network: Any = build_strictly(build, read_state(weights), weights, device, dtype)
        size = network.visual.image_size  # a number of ResNets, a pair of transformers
        if not isinstance(size, int) and size[0] != size[1]:
            raise UserError(f"models of open_clip that take square pictures are supported, not {size}")
        self.size: int = size if isinstance(size, int) else size[0]
        self._network = network
        self._dtype = dtype
        self._device = device
        self._tokenizer = library.SimpleTokenizer(
            context_length=text.get("context_length", TOKENS), **(text.get("tokenizer_kwargs") or {})
        )
        self._texts = Texts(self._embed)

    def cosines(self, pixels_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines (B,) between preprocessed pictures (B, 3, size, size) and as many texts."""
        texts_BD = self._texts(texts, len(pixels_BCHW))
        return (unit(self._network.encode_image(pixels_BCHW.to(self._dtype))) * texts_BD).sum(-1)

    def _embed(self, text: str) -> Tensor:
        embedding: Tensor = self._network.encode_text(self._tokenizer([text]).to(self._device))
        return embedding
