"""The tokenizer and the text encoder: a byte-pair vocabulary of our own in the format of CLIP."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_LENGTH = 24
WIDTH = 192
# The last tokens of a caption are padding, which sees all its words: one for each cell of a 4x4 grid.
GRID = 4
START, END = "<|startoftext|>", "<|endoftext|>"
# How CLIP's tokenizer cuts an ASCII text before the byte pairs: words, single digits, other runs.
PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")


def byte_symbols() -> list[str]:
    """Return the 256 printable characters that stand for the bytes, in GPT-2's order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(len(rest))]


def learn_merges(captions: Iterable[str]) -> list[tuple[str, str]]:
    """Return the byte-pair merges that make every piece of the captions one token.

    Each distinct piece counts once and ties are broken alphabetically, so the result does not depend on
    the order of the captions. The captions must be ASCII.
    """
    pieces = {piece for text in captions for piece in PIECES.findall(text.lower())}
    words = [[*piece[:-1], piece[-1] + "</w>"] for piece in sorted(pieces)]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1


def write_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn a tokenizer, save it into `folder`, and return it as loaded from there.

    All 256 bytes are tokens, both inside and at the end of a word, so that any text can be encoded.
    Written by hand as `vocab.json` and `merges.txt`, the form that every version of transformers reads.
    """
    merges = learn_merges(captions)
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained CLIPTextModel of two layers for the tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
