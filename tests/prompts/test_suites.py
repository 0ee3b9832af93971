"""The shipped suites: pinned content, disjoint splits, names that the embedded model knows."""

import importlib
import json
import re
from pathlib import Path

import pytest

from harness.prompts import SPLITS, PromptSuite

ROOT = Path(__file__).parents[2]
VOCABULARY = json.loads((ROOT / "models" / "emoji" / "vocabulary.json").read_text(encoding="utf-8"))
NAMES = {entry["name"]: entry for entry in VOCABULARY["names"]}
# A change of a prompt, an id or a label changes the hash: then raise the suite's version, and pin both anew.
PINNED = {
    "activities": ("1", "412deecdeeeb07942fa34a442901898ff091c5eed8db09ed13007c068b85953c"),
    "animals": ("1", "8c0004a538254ef539dcf198f08330ec2192c64f689e484f0c581c85af22f67a"),
    "compositional": ("1", "71bdfbda771abde2e84d4e07f4dcbf7c5e0c32416dfeafcb99250a70023e7977"),
    "emoji-animals": ("1", "30d06ab243bee04d549cd2ff63aeb9983aa16074934920f907da5017459057c4"),
    "emoji-animals-colours": ("1", "eda532d549b2abff5d74c94985db810243c547f295d7afd169fdc5d98e175b19"),
}
# Their texts are the user's own copy: tests/prompts/test_benchmarks.py.
FROM_A_COPY = {"drawbench", "hpdv2", "partiprompts", "pick-a-pic"}
SIZES = {
    "activities": (135, 15, 18),
    "animals": (45, 5, 6),
    "compositional": (240, 48, 144),
    "emoji-animals": (42, 10, 32),
    "emoji-animals-colours": (126, 9, 42),
}

PAIRS = {"two", "position", "attribution"}


def suite(name: str) -> PromptSuite:
    """The suite of the file that carries its name."""
    built: PromptSuite = importlib.import_module(f"prompts.{name.replace('-', '_')}").suite()
    return built


def test_every_suite_is_pinned() -> None:
    """No file of the folder is left out of these tests."""
    files = {path.stem.replace("_", "-") for path in (ROOT / "prompts").glob("[!_]*.py")}
    assert files - FROM_A_COPY == set(PINNED) == set(SIZES)


@pytest.mark.parametrize("name", sorted(PINNED))
def test_content_is_pinned_to_the_version(name: str) -> None:
    """Version and sha256 belong together, and the suite is named as its file."""
    built = suite(name)
    assert built.name == name
    assert (built.version, built.sha256) == PINNED[name]
    assert tuple(len(built.split(split)) for split in SPLITS) == SIZES[name]
    assert built.licence


@pytest.mark.parametrize("name", sorted(PINNED))
def test_splits_are_disjoint_and_ids_name_files(name: str) -> None:
    """No text and no id occurs twice, not even in different case."""
    prompts = [prompt for split in SPLITS for prompt in suite(name).split(split)]
    assert len({prompt.text.lower() for prompt in prompts}) == len(prompts)
    assert len({prompt.id.lower() for prompt in prompts}) == len(prompts)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", prompt.id) for prompt in prompts)


@pytest.mark.parametrize("name", sorted(set(PINNED) - {"compositional"}))
def test_no_animal_is_trained_on_and_held_out(name: str) -> None:
    """Held-out animals are new to fine-tuning; where combinations are held out, each part is known."""
    built = suite(name)
    training, held_out = ({p.metadata["object"] for p in split} for split in (built.training, built.held_out))
    if name == "emoji-animals-colours":
        assert held_out == training
        assert {p.metadata["colour"] for p in built.held_out} == {p.metadata["colour"] for p in built.training}
    else:
        assert not held_out & training


@pytest.mark.parametrize("name", ["emoji-animals", "emoji-animals-colours"])
def test_emoji_prompts_speak_the_models_language(name: str) -> None:
    """Every object has sprites in all three styles and its caption's article; every colour is in the vocabulary."""
    for split in SPLITS:
        for prompt in suite(name).split(split):
            entry = NAMES[prompt.metadata["object"]]
            assert entry["animal"]
            assert all(count > 0 for count in entry["sprites"].values())
            text = f"{entry['article']} {entry['name']}"
            if colour := prompt.metadata.get("colour"):
                assert colour in VOCABULARY["colours"]
                text += f" on {'an' if colour == 'orange' else 'a'} {colour} background"
            assert prompt.text == text


def test_colours_are_trained_on_equally_often() -> None:
    """Each of the 12 colours occurs 10 or 11 times in training, 3 or 4 times held out, each animal 3 and 1 times."""
    built = suite("emoji-animals-colours")
    for split, counts in ((built.training, {10, 11}), (built.held_out, {3, 4})):
        colours = [prompt.metadata["colour"] for prompt in split]
        assert set(colours) == set(VOCABULARY["colours"])
        assert {colours.count(colour) for colour in set(colours)} == counts
        objects = [prompt.metadata["object"] for prompt in split]
        assert {objects.count(name) for name in objects} == {len(split) // 42}


def test_the_papers_lists_are_complete() -> None:
    """45 simple animals as bare words, the six held-out ones, and the three activities with their article."""
    animals, activities = suite("animals"), suite("activities")
    assert {"cat", "squirrel", "bee", "camel", "kangaroo"} < {prompt.text for prompt in animals.training}
    expected = {"snail", "hippopotamus", "cheetah", "crocodile", "lobster", "octopus"}
    assert {prompt.text for prompt in animals.held_out} == expected
    texts = {prompt.text for prompt in activities.training + activities.held_out}
    assert {"an ant riding a bike", "a llama playing chess", "an octopus washing the dishes"} <= texts


def test_compositions_share_no_object_between_splits() -> None:
    """Nothing that is held out, alone or beside something else, is ever trained on or validates."""
    built = suite("compositional")
    seen = [{o["object"] for p in built.split(split) for o in p.metadata["objects"]} for split in SPLITS]
    assert [len(objects) for objects in seen] == [40, 8, 24]
    assert len(set.union(*seen)) == sum(map(len, seen))
    words = [{word for name in objects for word in name.split()} for objects in seen]
    assert len(set.union(*words)) == sum(map(len, words))


def test_labels_of_compositions_say_what_the_text_says() -> None:
    """Read from the text alone by a grammar of its own: objects, counts, colours and the position are the labels."""
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}
    colours = "red|green|yellow|blue|orange|purple|white|pink|brown|black"
    thing = rf"(a|an|two|three|four) (?:({colours}) )?([a-z]+)"
    joint = r"(?: (and|to the left of|to the right of|above|below) "
    for split in SPLITS:
        prompts = suite("compositional").split(split)
        singular = {o["object"] for p in prompts for o in p.metadata["objects"]}
        for prompt in prompts:
            match = re.fullmatch(rf"a photo of {thing}{joint}{thing})?", prompt.text)
            assert match is not None
            read = [(match[1], match[2], match[3])] + ([(match[5], match[6], match[7])] if match[4] else [])
            labelled = prompt.metadata["objects"]
            assert len(read) == len(labelled) == (2 if prompt.metadata["task"] in PAIRS else 1)
            for (number, colour, noun), label in zip(read, labelled, strict=True):
                assert numbers[number] == label["count"]
                assert colour == label.get("colour")
                if label["count"] == 1:
                    assert noun == label["object"]
                    assert (number == "an") == ((colour or noun)[0] in "aeiou")
                else:
                    assert noun.startswith(label["object"])
                    assert noun not in singular or noun == "sheep"
            assert (prompt.metadata["task"] == "counting") == (labelled[0]["count"] > 1)
            assert (prompt.metadata["task"] in ("colours", "attribution")) == ("colour" in labelled[-1])
            position = prompt.metadata.get("position")
            assert (match[4] or "and").replace("to the ", "").replace(" of", "") == (position or "and")
            if prompt.metadata["task"] == "attribution":
                assert labelled[0]["colour"] != labelled[1]["colour"]


def test_any_first_part_of_the_compositions_is_balanced() -> None:
    """Six prompts have the six tasks and six first objects; over a split every object is first once in each task."""
    for split in SPLITS:
        prompts = suite("compositional").split(split)
        for start in range(0, len(prompts), 6):
            part = prompts[start : start + 6]
            assert len({p.metadata["task"] for p in part}) == 6
            assert len({p.metadata["objects"][0]["object"] for p in part}) == 6
        firsts = [(p.metadata["task"], p.metadata["objects"][0]["object"]) for p in prompts]
        assert len(set(firsts)) == len(firsts)
        colours = [p.metadata["objects"][0]["colour"] for p in prompts if p.metadata["task"] == "colours"]
        assert max(map(colours.count, colours)) - min(map(colours.count, set(colours))) <= 1
