"""Animals that the embedded emoji model knows, in its caption's words ("a fox"); its default suite."""

from __future__ import annotations

from harness.prompts import Prompt, PromptSuite
from prompts import _animals

# All have sprites in each of the three styles, and look unlike their neighbours in the lists.
VALIDATION = (
    "otter", "donkey", "beaver", "ram", "dodo", "orangutan", "baby chick", "bactrian camel", "tropical fish",
    "honeybee",
)  # fmt: skip
HELD_OUT = (
    "elephant", "penguin", "koala", "owl", "giraffe", "crab", "octopus", "snail", "hippopotamus", "crocodile",
    "lobster", "panda", "polar bear", "rhinoceros", "flamingo", "peacock", "parrot", "swan", "eagle", "rooster",
    "seal", "jellyfish", "shrimp", "squid", "scorpion", "lady beetle", "sloth", "hamster", "leopard", "blowfish",
    "moose", "skunk",
)  # fmt: skip


def suite() -> PromptSuite:
    """42 simple animals for training, 10 for validation, 32 held out; the label `object` is the animal.

    "Held out" means from fine-tuning: the generator was trained on all of them.
    """
    return PromptSuite(
        name="emoji-animals",
        version="1",
        training=_prompts(tuple(name for name in _animals.SIMPLE if name not in _animals.WITHOUT_EMOJI)),
        validation=_prompts(VALIDATION),
        held_out=_prompts(HELD_OUT),
        licence=_animals.LICENCE,
    )


def _prompts(names: tuple[str, ...]) -> tuple[Prompt, ...]:
    return tuple(Prompt(_animals.slug(name), _animals.with_article(name), {"object": name}) for name in names)
