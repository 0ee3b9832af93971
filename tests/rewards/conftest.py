"""Pictures for the tests of rewards: 24 compositions, drawn by `models.emoji.data.compose` with 8-bit pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from harness.prompts import Prompt

FOLDER = Path(__file__).parent
CRITICS = Path(__file__).parents[2] / "models" / "emoji" / "critics"


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    """Float32 (24, 3, 64, 64) in [0, 1]: 8 animals in the styles flat (0..7), simple (8..15) and 3d (16..23)."""
    with Image.open(FOLDER / "compositions.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGB"))).float() / 255
    return pixels.reshape(3, 64, 8, 64, 3).permute(0, 2, 4, 1, 3).reshape(24, 3, 64, 64)


@pytest.fixture(scope="session")
def labels() -> list[dict[str, str]]:
    """Object, style and colour of each picture."""
    content: list[dict[str, str]] = json.loads((FOLDER / "compositions.json").read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="session")
def prompts(labels: list[dict[str, str]]) -> list[Prompt]:
    """The full caption of each picture, with its labels as metadata."""
    captions = [
        f"{'an' if (thing := row['style'] + ' ' + row['object'])[0] in 'aeiou' else 'a'} {thing} on "
        f"{'an' if row['colour'][0] in 'aeiou' else 'a'} {row['colour']} background"
        for row in labels
    ]
    return [Prompt(str(i), text, row) for i, (text, row) in enumerate(zip(captions, labels, strict=True))]


@pytest.fixture(scope="session")
def figures() -> dict[str, dict[str, float]]:
    """The stated figures of each critic that is trained to the end."""
    content = json.loads((CRITICS / "metrics.json").read_text(encoding="utf-8"))
    return {name: entry["figures"] for name, entry in content.items() if entry["trained"]}
