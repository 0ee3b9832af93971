"""Animals in three human activities, the prompts of DDPO's alignment experiment; for real models."""

from __future__ import annotations

from harness.prompts import Prompt, PromptSuite
from prompts import _animals

ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")


def suite() -> PromptSuite:
    """45 x 3 for training, 5 x 3 for validation, 6 x 3 held out; labels `object` and `activity`."""
    return PromptSuite(
        name="activities",
        version="1",
        training=_prompts(_animals.SIMPLE),
        validation=_prompts(_animals.VALIDATION),
        held_out=_prompts(_animals.HELD_OUT),
        licence=_animals.LICENCE,
    )


def _prompts(names: tuple[str, ...]) -> tuple[Prompt, ...]:
    """Every animal once, with the activities in turn, then all again with the next: a part of the list is balanced."""
    pairs = [
        (name, ACTIVITIES[(place + turn) % len(ACTIVITIES)])
        for turn in range(len(ACTIVITIES))
        for place, name in enumerate(names)
    ]
    return tuple(
        Prompt(
            _animals.slug(f"{name} {activity}"),
            f"{_animals.with_article(name)} {activity}",
            {"object": name, "activity": activity},
        )
        for name, activity in pairs
    )
