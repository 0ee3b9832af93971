"""The 45 simple animals of the DDPO and DRaFT experiments, each prompt the bare word, as there."""

from __future__ import annotations

from harness.prompts import Prompt, PromptSuite
from prompts import _animals


def suite() -> PromptSuite:
    """45 for training, 5 for validation, 6 held out; the label `object` is the animal."""
    return PromptSuite(
        name="animals",
        version="1",
        training=_prompts(_animals.SIMPLE),
        validation=_prompts(_animals.VALIDATION),
        held_out=_prompts(_animals.HELD_OUT),
        licence=_animals.LICENCE,
    )


def _prompts(names: tuple[str, ...]) -> tuple[Prompt, ...]:
    return tuple(Prompt(_animals.slug(name), name, {"object": name}) for name in names)
