"""Prompts and prompt suites (no torch here)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["training", "validation", "held-out"]
SPLITS: tuple[Split, ...] = ("training", "validation", "held-out")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: Unique within its suite, stable over versions; letters, digits, dash, dot and underscore (it names files).
        text: What the model is told.
        metadata: Labels for rewards and gold metrics (`object`, `colour`, `style`...).
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSuite:
    """A named, versioned list of prompts in three disjoint splits.

    Attributes:
        name: On the command line.
        version: Bumped whenever a prompt changes.
        training: What methods train on.
        validation: For a method's own early stopping and for tuning presets; never reported as a result.
        held_out: Never reaches `iterate`.
        licence: Licence of the texts and where they are from.
    """

    name: str
    version: str
    training: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    licence: str = ""

    def split(self, name: Split) -> tuple[Prompt, ...]:
        """The prompts of one split."""
        return {"training": self.training, "validation": self.validation, "held-out": self.held_out}[name]

    @property
    def sha256(self) -> str:
        """Hash of every id, text and label in order."""
        lines = [
            json.dumps([split, p.id, p.text, dict(p.metadata)], sort_keys=True, ensure_ascii=False)
            for split in SPLITS
            for p in self.split(split)
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
