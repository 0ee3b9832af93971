"""Prompts of users of Pick-a-Pic in its three splits, from your copy: --suite pick-a-pic=DIRECTORY."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from harness.prompts import Prompt, PromptSuite
from prompts import _benchmarks, _files

SPLITS = {"training": "train", "validation": "validation", "held-out": "test"}
# The data set's own selection for evaluation: one example of each prompt, and one prompt of each user.
SELECTED = {"training": "train", "validation": "validation_unique", "held-out": "test_unique"}
PICK_A_PIC = _benchmarks.Benchmark(
    name="pick-a-pic",
    layout=(
        "a directory with train.txt, validation.txt and test.txt, one prompt a line, or with the Parquet files "
        "train-*, validation_unique-* and test_unique-*, of which the column caption is read; test is required"
    ),
    where=(
        "https://huggingface.co/datasets/yuvalkirstain/pickapic_v1_no_images, and as lists of lines in the repository "
        "yifan123/flow_grpo, dataset/pickscore"
    ),
    licence="the data set's card names no licence; prompts are from users, some of them offensive",
)


def suite(given: str | None) -> PromptSuite:
    """The data set's splits, each text once; a text of a later split is in no earlier one. No labels.

    Prompts are in the order of the hashes of their texts: that of the data set is by user and time.

    Args:
        given: Where the copy is, as `Benchmark.read` says.

    Raises:
        UserError: The copy is missing or holds something else.
    """
    contents = PICK_A_PIC.read(given, lambda path: [file for split in SPLITS for file in _parts(path, split)])
    taken: set[str] = set()
    prompts: dict[str, tuple[Prompt, ...]] = {}
    for split in reversed(SPLITS):
        files = [file for file in contents.files if _split_of(file) == split]
        texts = {text for file in files for text in _texts(file, contents.files[file])}
        fresh = {text.casefold(): text for text in sorted(texts, reverse=True) if text.casefold() not in taken}
        taken.update(fresh)
        prompts[split] = tuple(_files.ranked(Prompt(_files.id_of(text), text) for text in fresh.values()))
    if not prompts["held-out"]:
        raise PICK_A_PIC.error("no file has prompts of the test split")
    return PromptSuite(
        name=PICK_A_PIC.name,
        version=contents.version,
        training=prompts["training"],
        validation=prompts["validation"],
        held_out=prompts["held-out"],
        licence=PICK_A_PIC.licence,
    )


def _parts(path: Path, split: str) -> list[Path]:
    """The files of a split, in one of the two formats."""
    lines = sorted(path.glob(f"{SPLITS[split]}.txt"))
    tables = sorted(path.glob(f"{SELECTED[split]}-*.parquet"))
    if lines and tables:
        raise PICK_A_PIC.error(f"{path} has both {lines[0].name} and {tables[0].name}; remove one")
    return lines or tables


def _split_of(file: Path) -> str:
    name = file.stem.partition("-")[0]
    return next(split for split in SPLITS if name in (SPLITS[split], SELECTED[split]))


def _texts(file: Path, content: bytes) -> Iterable[str]:
    if file.suffix == ".txt":
        raw = [line for line in PICK_A_PIC.text(file, content).split("\n") if line.strip()]
    else:
        import pyarrow.parquet
        from pyarrow.lib import ArrowException

        try:
            raw = pyarrow.parquet.read_table(io.BytesIO(content), columns=["caption"])["caption"].to_pylist()
        except (ArrowException, KeyError) as error:
            raise PICK_A_PIC.error(f"{file} is no Parquet file with a column caption ({error})") from None
        raw = [caption for caption in raw if caption and caption.strip()]
    return (PICK_A_PIC.prompt_text(text, f"{file}, prompt {number}") for number, text in enumerate(raw, 1))
