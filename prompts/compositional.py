"""Compositions that a detector can check: one or two objects, counts, colours, positions, colours of each of two."""

from __future__ import annotations

from typing import Any

from harness.prompts import Prompt, PromptSuite

# Everyday objects that detectors of open vocabulary know, in an order in which neighbours are unlike. The splits share
# none, so that no composition of held-out objects can have been trained on.
TRAINING = (
    "dog", "bicycle", "apple", "chair", "umbrella", "horse", "laptop", "pizza", "boat", "vase",
    "cat", "truck", "banana", "sofa", "backpack", "cow", "clock", "cake", "train", "lamp",
    "sheep", "motorcycle", "carrot", "bed", "hat", "elephant", "keyboard", "sandwich", "bus", "book",
    "zebra", "skateboard", "tomato", "bench", "shoe", "bear", "telephone", "cup", "kite", "mirror",
)  # fmt: skip
VALIDATION = ("rabbit", "guitar", "pear", "table", "candle", "helicopter", "basket", "duck")
HELD_OUT = (
    "giraffe", "airplane", "cabbage", "suitcase", "violin", "penguin", "teapot", "donut", "car", "pillow",
    "owl", "balloon", "pumpkin", "stool", "bucket", "fox", "camera", "mushroom", "tractor", "bottle",
    "turtle", "drum", "lemon", "ladder",
)  # fmt: skip
PLURALS = {
    "sheep": "sheep", "bus": "buses", "bench": "benches", "sandwich": "sandwiches", "tomato": "tomatoes",
    "fox": "foxes",
}  # fmt: skip
COLOURS = ("red", "green", "yellow", "blue", "orange", "purple", "white", "pink", "brown", "black")
NUMBERS = {2: "two", 3: "three", 4: "four"}
POSITIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
TASKS = ("single", "two", "counting", "colours", "position", "attribution")


def suite() -> PromptSuite:
    """240 for training, 48 for validation, 144 held out: every object of the split once as the first of each task.

    Labels: `task`; `objects`, a list of what must be seen, each with `object`, `count` and, where it is asked for,
    `colour`; for the task position also `position`, of the first object as seen from the second.
    The tasks come in turn, and objects rotate: a part of the list is balanced.
    """
    return PromptSuite(
        name="compositional",
        version="1",
        training=_prompts(TRAINING),
        validation=_prompts(VALIDATION),
        held_out=_prompts(HELD_OUT),
        licence="Apache-2.0",
    )


def _prompts(objects: tuple[str, ...]) -> tuple[Prompt, ...]:
    # Five places apart, so that the six prompts of one turn are about different objects, whatever the list's length.
    return tuple(
        _prompt(task, objects, (turn + 5 * place) % len(objects))
        for turn in range(len(objects))
        for place, task in enumerate(TASKS)
    )


def _prompt(task: str, objects: tuple[str, ...], i: int) -> Prompt:
    """The i-th object in a task; the second object, if any, is the first, second or third after it by task."""
    first = objects[i]
    colour, other_colour = COLOURS[i % 10], COLOURS[(3 * i + 1) % 10]
    labels: dict[str, Any] = {"task": task}
    match task:
        case "single":
            text, seen = _article(first), [_object(first)]
        case "two":
            second = objects[(i + 1) % len(objects)]
            text, seen = f"{_article(first)} and {_article(second)}", [_object(first), _object(second)]
        case "counting":
            count = 2 + i % 3
            text, seen = f"{NUMBERS[count]} {_plural(first)}", [_object(first, count)]
        case "colours":
            text, seen = _article(f"{colour} {first}"), [_object(first, colour=colour)]
        case "position":
            second = objects[(i + 2) % len(objects)]
            labels["position"] = list(POSITIONS)[i % 4]
            text = f"{_article(first)} {POSITIONS[labels['position']]} {_article(second)}"
            seen = [_object(first), _object(second)]
        case _:
            second = objects[(i + 3) % len(objects)]
            text = f"{_article(f'{colour} {first}')} and {_article(f'{other_colour} {second}')}"
            seen = [_object(first, colour=colour), _object(second, colour=other_colour)]
    return Prompt(f"{task}-{first.replace(' ', '-')}", f"a photo of {text}", {**labels, "objects": seen})


def _object(name: str, count: int = 1, colour: str = "") -> dict[str, Any]:
    return {"object": name, "count": count, **({"colour": colour} if colour else {})}


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _plural(name: str) -> str:
    return PLURALS.get(name, f"{name}s")
