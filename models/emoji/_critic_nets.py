"""The five critics as library classes: how they are built, saved, loaded and called.

A classifier is a folder with `config.json` and `model.safetensors` (fp16), written by `save_pretrained`; a
CLIP is two such folders, `image` and `text`, the latter with a tokenizer (`vocab.json`, `merges.txt`). All
take float pictures (B, 3, 64, 64) in [0, 1], normalised by `image_mean` and `image_std` of their config.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

FOLDER = Path(__file__).parent / "critics"
CLASSES = {
    "style3d": "ResNetForImageClassification",
    "clip": "ResNetForImageClassification",
    "object": "ResNetForImageClassification",
    "style3d_heldout": "RegNetForImageClassification",
    "clip_heldout": "RegNetForImageClassification",
}
EMBEDDING = 64
CAPTION_TOKENS = 24
WORD = r"[^\W\d_]+|\d|[^\s\w]+"  # as the tokenizer splits: letters, one digit, or punctuation
START, END = "<|startoftext|>", "<|endoftext|>"
NORMALISATION = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


class Clip(nn.Module):
    """A picture tower and a text tower, two library models that are stored side by side.

    Attributes:
        image: a classifier whose `logits` (B, 64) are the picture's embedding.
        text: a `CLIPTextModelWithProjection`; its `text_embeds` (B, 64) are the caption's embedding.
        logit_scale: logarithm of the factor of the cosines in the training loss.
        hints: what animal, style and colour the embedding shows; for training only.
    """

    def __init__(self, image: nn.Module, text: nn.Module, hints: int = 0) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        self.hints = nn.Linear(EMBEDDING, hints) if hints else nn.Identity()


def build(name: str, labels: Sequence[str], tokens: int = 0) -> nn.Module:
    """Return the untrained critic `name`; initialised from torch's global generator.

    Args:
        name: a key of `CLASSES`.
        labels: the classes in their order; of a CLIP, what its training asks on the way.
        tokens: size of the tokenizer's vocabulary, for the CLIPs.
    """
    import transformers  # takes seconds

    if name.startswith("clip"):
        text = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(
                vocab_size=tokens,
                bos_token_id=tokens - 2,
                eos_token_id=tokens - 1,
                pad_token_id=tokens - 1,
                max_position_embeddings=CAPTION_TOKENS,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=EMBEDDING,
            )
        )
        return Clip(_tower(name, {"num_labels": EMBEDDING}), text, len(labels))
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return _tower(name, named)


def _tower(name: str, outputs: dict[str, Any]) -> nn.Module:
    import transformers

    model: nn.Module
    if CLASSES[name].startswith("RegNet"):
        config = transformers.RegNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 192],
            depths=[1, 1, 2, 1],
            groups_width=16,
            layer_type="y",
            **NORMALISATION,
            **outputs,
        )
        model = transformers.RegNetForImageClassification(config)
    else:
        gold = name == "object"
        config = transformers.ResNetConfig(
            embedding_size=32 if gold else 24,
            hidden_sizes=[32, 64, 128, 192] if gold else [32, 64, 96, 128],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            hidden_act="relu" if gold else "silu",  # smooth where gradients flow through it
            **NORMALISATION,
            **outputs,
        )
        model = transformers.ResNetForImageClassification(config)
    return model


def load(name: str, folder: Path = FOLDER) -> nn.Module:
    """Return the critic `name` of `folder` in float32, in evaluation mode, frozen."""
    import transformers

    tower = getattr(transformers, CLASSES[name])
    model: nn.Module
    if name.startswith("clip"):
        text = transformers.CLIPTextModelWithProjection.from_pretrained(folder / name / "text")
        model = Clip(tower.from_pretrained(folder / name / "image"), text)
    else:
        model = tower.from_pretrained(folder / name)
    return model.float().eval().requires_grad_(False)


def save(model: nn.Module, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (fp16); the model itself is rounded to fp16 and back.

    A CLIP becomes two folders, `image` and `text`.
    """
    if isinstance(model, Clip):
        save(model.image, folder / "image")
        save(model.text, folder / "text")
        return
    library: Any = model
    library.half().save_pretrained(folder)
    model.float()
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def load_tokenizer(folder: Path) -> Any:
    """Return the `CLIPTokenizer` stored in the folder `text` of one CLIP."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def normalised(model: nn.Module, images: Tensor) -> Tensor:
    """Map pictures (B, 3, 64, 64) in [0, 1] to what the network takes, in its memory order."""
    config: Any = model.config
    mean = images.new_tensor(config.image_mean).view(1, 3, 1, 1)
    std = images.new_tensor(config.image_std).view(1, 3, 1, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return a classifier's logits (B, classes) of pictures (B, 3, 64, 64) in [0, 1]."""
    result: Tensor = model(pixel_values=normalised(model, images)).logits
    return result


def image_features(model: nn.Module, images: Tensor) -> Tensor:
    """Return a CLIP's unit embeddings (B, 64) of pictures (B, 3, 64, 64) in [0, 1]."""
    clip: Any = model
    return F.normalize(logits(clip.image, images), dim=-1)


def text_features(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return a CLIP's unit embeddings (B, 64) of captions as token ids, int64 (B, L)."""
    clip: Any = model
    return F.normalize(clip.text(input_ids=tokens).text_embeds, dim=-1)


def tokenised(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Return token ids, int64 (B, L), padded to the longest and cut to `CAPTION_TOKENS`.

    Padding does not matter: the text towers are causal and read the first end token.
    """
    encoded = tokenizer(list(captions), padding=True, truncation=True, max_length=CAPTION_TOKENS)
    return torch.tensor(encoded["input_ids"])


def byte_alphabet() -> list[str]:
    """Return the 256 characters that stand for the bytes in byte-level BPE, in order of the bytes."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


def write_tokenizer(captions: Sequence[str], folder: Path, merges: int = 600) -> int:
    """Train a byte-level BPE on `captions` and write it as `CLIPTokenizer` files; return its size.

    Every byte is a token, so that no word is ever unknown. Ties are broken alphabetically: the same
    captions give the same files.
    """
    words = Counter(word for caption in captions for word in re.findall(WORD, caption.lower()))
    alphabet = byte_alphabet()
    split = {
        word: [*(alphabet[byte] for byte in word.encode()[:-1]), alphabet[word.encode()[-1]] + "</w>"] for word in words
    }
    learnt: list[tuple[str, str]] = []
    while len(learnt) < merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(best)
        split = {word: _merged(pieces, best) for word, pieces in split.items()}
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in learnt)]
    tokens = [*dict.fromkeys(tokens), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in learnt)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "model_max_length": CAPTION_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return len(tokens)


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result
