"""Emoji animals on a named background ("a fox on a blue background"); unseen combinations are held out."""

from __future__ import annotations

from harness.prompts import Prompt, PromptSuite
from prompts import _animals

# In the order of the embedded model's vocabulary.
COLOURS = (
    "red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "grey", "black", "white",
)  # fmt: skip


def suite() -> PromptSuite:
    """126 combinations for training, 9 for validation, 42 held out; labels `object` and `colour`.

    The i-th of the 42 animals trains with the colours i, i+4 and i+8 (modulo 12), is held out with colour i+2, and
    every fifth validates with colour i+6: every animal and colour is trained on, no held-out combination is.
    Each animal comes once before any comes again, so that a part of the list is balanced.
    """
    animals = tuple(name for name in _animals.SIMPLE if name not in _animals.WITHOUT_EMOJI)
    places = range(len(animals))
    return PromptSuite(
        name="emoji-animals-colours",
        version="1",
        training=tuple(_prompt(animals[i], i + offset) for offset in (0, 4, 8) for i in places),
        validation=tuple(_prompt(animals[i], i + 6) for i in places[::5]),
        held_out=tuple(_prompt(animals[i], i + 2) for i in places),
        licence=_animals.LICENCE,
    )


def _prompt(animal: str, index: int) -> Prompt:
    colour = COLOURS[index % len(COLOURS)]
    text = f"{_animals.with_article(animal)} on {_animals.with_article(colour)} background"
    return Prompt(_animals.slug(f"{animal} {colour}"), text, {"object": animal, "colour": colour})
