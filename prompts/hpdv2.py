"""The 3200 evaluation prompts of HPSv2 in four styles, from your copy: --suite hpdv2=DIRECTORY."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.prompts import Prompt, PromptSuite
from prompts import _benchmarks, _files

STYLES = ("anime", "concept-art", "paintings", "photo")
PER_STYLE = 800
TRAINING = "train.json"
HPDV2 = _benchmarks.Benchmark(
    name="hpdv2",
    layout=(
        "a directory with anime.json, concept-art.json, paintings.json and photo.json, each a list of 800 prompts; to "
        "train on it also train.json, a list of objects with a prompt"
    ),
    where=(
        "https://huggingface.co/datasets/zhwang/HPDv2, folder benchmark, and train.json at "
        "https://huggingface.co/datasets/ymhao/HPDv2"
    ),
    licence="Apache-2.0; from DiffusionDB, CC0, and for photo from the captions of COCO, CC BY 4.0",
)


def suite(given: str | None) -> PromptSuite:
    """800 prompts of each style, held out, the styles in turn; label `style`, and `index`, the place in its list.

    With the data set's own `train.json` its prompts are trained on, each text once, except those that are evaluated;
    a twentieth of them validates.

    Args:
        given: Where the copy is, as `Benchmark.read` says.

    Raises:
        UserError: The copy is missing or holds something else.
    """
    contents = HPDV2.read(given, _parts)
    parsed = {path.name: _parsed(path, content) for path, content in contents.files.items()}
    held_out = []
    for style in STYLES:
        texts = parsed[f"{style}.json"]
        if len(texts) != PER_STYLE:
            raise HPDV2.error(f"{style}.json has {len(texts)} prompts instead of {PER_STYLE}")
        for index, raw in enumerate(texts):
            text = HPDV2.prompt_text(raw, f"{style}.json, entry {index}")
            held_out.append(Prompt(f"{style}-{index:03}", text, {"style": style, "index": index}))
    training, validation = _training(parsed.get(TRAINING, []), {prompt.text.casefold() for prompt in held_out})
    return PromptSuite(
        name=HPDV2.name,
        version=contents.version,
        training=training,
        validation=validation,
        held_out=_benchmarks.balanced(held_out, "style"),
        licence=HPDV2.licence,
    )


def _parts(path: Path) -> list[Path]:
    return [path / f"{style}.json" for style in STYLES] + ([path / TRAINING] if (path / TRAINING).is_file() else [])


def _parsed(path: Path, content: bytes) -> list[Any]:
    try:
        parsed = json.loads(HPDV2.text(path, content))
    except (ValueError, RecursionError) as error:
        raise HPDV2.error(f"{path} is not JSON ({error})") from None
    if not isinstance(parsed, list):
        raise HPDV2.error(f"{path} is no list")
    return parsed


def _training(entries: list[Any], evaluated: set[str]) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Training and validation prompts: each text once, none that is evaluated; by the hash of the text, in its order.

    The order of the data set groups pairs of the same prompt; that of the hashes is as good as a shuffled one.
    """
    texts = {
        HPDV2.prompt_text(entry.get("prompt") if isinstance(entry, dict) else None, f"{TRAINING}, entry {place}")
        for place, entry in enumerate(entries)
    }
    prompts = _files.ranked(Prompt(_files.id_of(text), text) for text in texts if text.casefold() not in evaluated)
    validation = len(prompts) // 20
    return tuple(prompts[validation:]), tuple(prompts[:validation])
