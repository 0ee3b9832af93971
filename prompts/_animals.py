"""Animals and articles that several suites share."""

from __future__ import annotations

# The 45 "simple animals" of the DDPO experiments (Black et al., 2023), which DRaFT's use as well.
SIMPLE = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion",
    "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale",
    "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig",
    "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo",
)  # fmt: skip
# What later work holds out from them (AlignProp, DAS).
HELD_OUT = ("snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus")
# This project's choice: in none of the lists above.
VALIDATION = ("elephant", "penguin", "owl", "giraffe", "crab")
# Simple animals without an emoji under this very name (there is a chipmunk, a honeybee, and two kinds of camel).
WITHOUT_EMOJI = ("squirrel", "bee", "camel")

LICENCE = "Apache-2.0; the names of the simple animals are those of the DDPO experiments (MIT)"


def with_article(phrase: str) -> str:
    """The phrase after "an" where it starts with a vowel letter (but "a unicorn"), after "a" elsewhere."""
    vowel = phrase[0] in "aeiou" and not phrase.startswith("uni")
    return f"{'an' if vowel else 'a'} {phrase}"


def slug(text: str) -> str:
    """The text as an id: lower case, dashes for blanks."""
    return text.lower().replace(" ", "-")
