"""Pictures from files scored by rewards, one size at a time; 8-bit pictures in float32, as in evaluation."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness import store
from harness.errors import UserError
from harness.evaluation import from_8_bit, full_precision
from harness.pictures import Picture, load_picture
from harness.reward_sources import RewardSource
from harness.rewarding import Reward

BATCH = 8
SHOWN = 48  # characters of a file's name in the table
Scores = dict[str, float]  # by reward; where a reward does not apply to the prompt, it is missing


@torch.no_grad()
def score_pictures(
    pictures: Sequence[Picture],
    sources: Mapping[str, RewardSource],
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Scores]:
    """The scores of each picture, in the order given.

    Pictures are read one after the other and wait until there are enough of their size for a batch.

    Raises:
        UserError: A picture cannot be read, or a reward cannot score.
    """
    rewards = {name: source.build(device) for name, source in sources.items()}
    scores: list[Scores] = [{} for _ in pictures]
    waiting: dict[tuple[int, ...], list[tuple[int, NDArray[np.uint8]]]] = defaultdict(list)
    done = 0
    for place, picture in enumerate(pictures):
        pixels = load_picture(picture.path)
        group = waiting[pixels.shape]
        group.append((place, pixels))
        if len(group) == BATCH:
            _score(waiting.pop(pixels.shape), pictures, rewards, device, scores)
            progress(done := done + BATCH)
    for group in waiting.values():
        _score(group, pictures, rewards, device, scores)
        progress(done := done + len(group))
    return scores


def _score(
    group: Sequence[tuple[int, NDArray[np.uint8]]],
    pictures: Sequence[Picture],
    rewards: Mapping[str, Reward],
    device: torch.device,
    scores: list[Scores],
) -> None:
    images = from_8_bit(np.stack([pixels for _, pixels in group]), device)
    prompts = [pictures[place].prompt for place, _ in group]
    for name, reward in rewards.items():
        rows = [row for row, prompt in enumerate(prompts) if reward.applies(prompt)]
        if rows:
            with full_precision():
                values = reward(images[rows], [prompts[row] for row in rows]).double().tolist()
            for row, value in zip(rows, values, strict=True):
                scores[group[row][0]][name] = value


def table(pictures: Sequence[Picture], scores: Sequence[Scores], names: Sequence[str]) -> list[str]:
    """Lines for the terminal: a picture each, and the mean of each reward over the pictures that it applies to."""
    files = [_shortened(str(picture.path)) for picture in pictures]
    means = {name: _mean([one[name] for one in scores if name in one]) for name in names}
    rows = [[file, *(_shown(one.get(name)) for name in names)] for file, one in zip(files, scores, strict=True)]
    rows.append([f"mean of {len(files)}", *(_shown(means[name]) for name in names)])
    rows.insert(0, ["file", *names])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([f"{row[0]:<{widths[0]}}", *_aligned(row[1:], widths[1:])]) for row in rows]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]


def _shortened(name: str) -> str:
    return name if len(name) <= SHOWN else f"...{name[3 - SHOWN :]}"


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def check_out(out: Path) -> None:
    """Refuse what `write` could not write, before anything is scored.

    Raises:
        UserError: The file's ending is another one.
    """
    if out.suffix.lower() not in (".csv", ".json"):
        raise UserError(f"--out {out}: scores are written as .csv or .json")


def write(
    out: Path, pictures: Sequence[Picture], scores: Sequence[Scores], sources: Mapping[str, RewardSource]
) -> None:
    """Scores to a file, complete or not at all.

    `.csv`: columns file, prompt, and one a reward; empty where it does not apply, `nan` where there is no number.
    `.json`: also labels, and version and unit of the rewards; there a missing key, and null.
    """
    if out.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "prompt", *sources])
        for picture, one in zip(pictures, scores, strict=True):
            values = [_digits(one[name]) if name in one else "" for name in sources]
            writer.writerow([str(picture.path), picture.prompt.text, *values])
        store.write_bytes(out, text.getvalue().encode())
        return
    content: dict[str, Any] = {
        "rewards": {name: {"version": s.version, "unit": s.reward.unit} for name, s in sources.items()},
        "pictures": [
            {
                "file": str(picture.path),
                "prompt": picture.prompt.text,
                "metadata": dict(picture.prompt.metadata),
                "scores": {
                    name: float(_digits(value)) if math.isfinite(value) else None for name, value in one.items()
                },
            }
            for picture, one in zip(pictures, scores, strict=True)
        ],
    }
    store.write_bytes(out, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _digits(value: float) -> str:
    """As many digits as tell a float32 from its neighbours."""
    return str(np.float32(value))
