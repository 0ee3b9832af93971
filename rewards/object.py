"""Objects to add to pictures or to remove from them, as an open-vocabulary detector sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from pydantic import field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from harness.api import ConfiguredReward, Prompt, RewardConfig, UserError, WeightFile
from rewards._preprocessing import CLIP_MEAN, CLIP_STD, as_pictures, known, normalised
from rewards._weights import build_strictly, read_config, read_state

REPO = "google/owlvit-base-patch32"
WEIGHTS, CONFIG, VOCABULARY, MERGES = "pytorch_model.bin", "config.json", "vocab.json", "merges.txt"
WHERE = f"https://huggingface.co/{REPO} (Apache-2.0; 613 MB)"
# The published architecture is the default of transformers' OwlViTConfig.
PUBLISHED: dict[str, Any] = {"model_type": "owlvit", "text_config": {}, "vision_config": {}, "projection_dim": 512}


@final
class _Settings(RewardConfig):
    """Which objects count; at least one.

    Attributes:
        add: Names of objects that should be seen, separated by commas.
        remove: Names of objects that should not be seen, separated by commas.
    """

    add: str = ""
    remove: str = ""

    @field_validator("add", "remove")
    @classmethod
    def _named(cls, value: str) -> str:
        if value and not all(part.strip() for part in value.split(",")):
            raise ValueError("write names of objects, separated by commas, as in remove=hat,glasses")
        return value

    @model_validator(mode="after")
    def _some(self) -> _Settings:
        if not self.add and not self.remove:
            raise ValueError("name an object: object[add=hat], object[remove=dog], object[add=hat,remove=dog]")
        return self


@final
class Object(ConfiguredReward):
    """How surely named objects are seen in the picture, less those that should not be: OWL-ViT's best boxes.

    Formula: sum over the objects of `add` minus sum over those of `remove` of max over boxes of
    sigmoid(logit(box, object)), by OWL-ViT base with patches of 32 (576 boxes), asked for "a photo of a NAME". Range:
    [-removed, added], in probabilities as the detector gives them (0.1 is its usual threshold); larger is better. DRaFT
    rewards the removal of objects by OWL-ViT, too; how it sums up the boxes is not published: the maximum is a choice
    made here. The prompt is not read. `object[add=hat]`, `object[remove=dog,cat]`, `object[add=hat,remove=dog]`.

    Pictures: 768x768, bicubic, antialiased, whatever the aspect ratio, CLIP's mean and deviation; the reference does
    this to 8-bit pictures. A name together with its question has at most 16 tokens.

    Weights: google/owlvit-base-patch32 on the hub (Minderer et al. 2022, arXiv:2205.06230; Apache-2.0), a directory in
    the layout of transformers: `pytorch_model.bin` (or `model.safetensors`, given as the file itself), `vocab.json`,
    `merges.txt`, and `config.json`, without which it is the published architecture.

    Raises:
        UserError: The files do not hold what is expected, or a name is too long.
    """

    name = "object"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "probability"
    family = "named"
    Config = _Settings

    @classmethod
    def files(cls, config: _Settings) -> tuple[WeightFile, ...]:
        """The weights, CLIP's tokenizer, and the architecture."""
        return (
            WeightFile(WEIGHTS, repo=REPO, where=WHERE),
            WeightFile(VOCABULARY, repo=REPO, where=WHERE),
            WeightFile(MERGES, repo=REPO, where=WHERE),
            WeightFile(CONFIG, repo=REPO, where=WHERE, optional=True),
        )

    def __init__(
        self, device: torch.device, config: _Settings, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import OwlViTForObjectDetection

        architecture = _architecture(files.get(CONFIG))
        added, removed = ([name.strip() for name in names.split(",") if name] for names in (config.add, config.remove))
        tokens = _tokenized([*added, *removed], files, architecture.text_config.max_position_embeddings)
        self._size: int = architecture.vision_config.image_size
        self._dtype = dtype
        self._exact = torch.float64 if dtype == torch.float64 else torch.float32
        # Position indices were stored by versions of transformers before 4.31.
        state = {
            name: value for name, value in read_state(files[WEIGHTS]).items() if not name.endswith(".position_ids")
        }
        network: Any = build_strictly(
            lambda: OwlViTForObjectDetection(architecture), state, files[WEIGHTS], device, self._exact
        )
        self._network = network
        if device.type != "meta":
            with torch.inference_mode(mode=False), torch.no_grad():
                ids, mask = (tokens[name].to(device) for name in ("input_ids", "attention_mask"))
                self._queries_QD: Tensor = network.owlvit.get_text_features(ids, attention_mask=mask).pooler_output
            network.owlvit.to(dtype)
            network.layer_norm.to(dtype)
            self._signs_Q = self._queries_QD.new_tensor([1.0] * len(added) + [-1.0] * len(removed))

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,); NaN where a picture is not finite.

        Raises:
            ValueError: The pictures are no floating-point (B, 3, H, W).
        """
        images = as_pictures(images_BCHW)
        pixels = images
        if pixels.shape[-2:] != (self._size, self._size):
            pixels = F.interpolate(images, (self._size, self._size), mode="bicubic", antialias=True)
        return known(self._seen(normalised(pixels, CLIP_MEAN, CLIP_STD)) @ self._signs_Q, images)

    def _seen(self, pixels_BCHW: Tensor) -> Tensor:
        """Probability of the best box of each object, (B, objects)."""
        features_BHWD, _ = self._network.image_embedder(pixel_values=pixels_BCHW.to(self._dtype))
        boxes_BND = features_BHWD.flatten(1, 2).to(self._exact)
        logits_BNQ, _ = self._network.class_predictor(boxes_BND, self._queries_QD.expand(len(boxes_BND), -1, -1))
        best: Tensor = logits_BNQ.amax(1)
        return best.sigmoid()

    def applies(self, prompt: Prompt) -> bool:
        """Always: the prompt is not read."""
        return True


def _architecture(path: Path | None) -> Any:
    """An `OwlViTConfig` of transformers: that of a `config.json`, or the published one.

    Raises:
        UserError: The file is no such configuration.
    """
    from transformers import OwlViTConfig

    content = read_config(path, PUBLISHED)
    if content.get("model_type") != "owlvit" or not {"text_config", "vision_config"} <= content.keys():
        raise UserError(
            f"{path} is no configuration of an OWL-ViT: it needs model_type owlvit, text_config and vision_config"
        )
    try:
        return OwlViTConfig(**content)
    except Exception as error:  # its validators raise many kinds
        raise UserError(f"{path} is no configuration of an OWL-ViT: {error}") from None


def _tokenized(names: Sequence[str], files: Mapping[str, Path], length: int) -> Any:
    """Token ids and masks (names, length) of the questions.

    Raises:
        UserError: The vocabulary cannot be read, or a question has more tokens than the network reads.
    """
    from transformers import CLIPTokenizer

    try:
        vocabulary = json.loads(files[VOCABULARY].read_text(encoding="utf-8"))
        lines = files[MERGES].read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if missing := {"<|startoftext|>", "<|endoftext|>"} - vocabulary.keys():
            raise ValueError(f"{' and '.join(sorted(missing))} not among its words")
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UserError(f"{files[VOCABULARY]} and {files[MERGES]} are no tokenizer of CLIP: {error}") from None
    questions = [f"a photo of a {name}" for name in names]
    for name, ids in zip(names, tokenizer(questions)["input_ids"], strict=True):
        if len(ids) > length:
            raise UserError(f"object: {name!r} is too long: with its question {len(ids)} tokens, at most {length}")
    return tokenizer(questions, padding="max_length", max_length=length, return_tensors="pt")
