"""`python -m harness score`: the numbers are the rewards' own, whatever the sizes, the order and the prompts."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness import cli, store
from harness.randomness import Randomness
from harness.registry import load_reward

CPU = torch.device("cpu")
FUNCTIONS = """
def first_pixel(images, prompts, metadata):
    return images[:, 0, 0, 0], {}

def words(images, prompts, metadata):
    return [len(prompt.split()) + 10 * labels.get("extra", 0) for prompt, labels in zip(prompts, metadata)], {}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of three sizes in turn, their first red value 10 i; and functions that score."""
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        size = [(8, 8), (16, 8), (8, 16)][i % 3]
        pixels = (Randomness(i).normal((*size, 3), "pixels") * 40 + 128).clamp(0, 255).byte().numpy()
        pixels[0, 0] = [10 * i, 0, 0]
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path


def score(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    """The command."""
    monkeypatch.setattr(sys, "argv", ["harness", "score", "--device", "cpu", *map(str, words)])
    cli.main()


def test_scores_are_the_rewards_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every picture beside its own score, in the order of the folder: equal to scoring it alone as float pixels."""
    first = f"{folder}/functions.py:first_pixel"
    out = folder / "scores.csv"
    score(monkeypatch, "--rewards", f"jpeg-bytes,{first}", "--prompt", "", folder / "pictures", "--out", out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(folder / "pictures" / f"{i}.png") for i in range(12)]
    reward = load_reward("jpeg-bytes")(CPU)
    for i, row in enumerate(rows):
        pixels = np.array(Image.open(row["file"]))
        alone = reward(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, [])
        assert np.float32(row["jpeg-bytes"]) == alone.item()
        assert np.float32(row[first]) == np.float32(10 * i / 255)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 12 + 1 + 2 + 1
    assert lines[13].split()[:3] == ["mean", "of", "12"]
    mean = math.fsum(float(row["jpeg-bytes"]) for row in rows) / 12
    assert float(lines[13].split()[3]) == pytest.approx(mean, rel=1e-4)
    assert lines[14] == "jpeg-bytes: version 1, kB"


def test_prompts_and_labels_reach_the_rewards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each picture with its own prompt, whatever batch it is in; JSON has labels, versions and units."""
    rows = [{"file": f"{i}.png", "prompt": "a " * (i + 1), "extra": i} for i in range(12)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    words = f"{folder}/functions.py:words"
    out = folder / "scores.json"
    score(monkeypatch, "--rewards", words, "--prompts", folder / "prompts.jsonl", folder / "pictures", "--out", out)
    content = store.read_json(out)
    assert [picture["scores"][words] for picture in content["pictures"]] == [11 * i + 1 for i in range(12)]
    assert content["pictures"][3]["metadata"] == {"extra": 3}
    assert content["pictures"][3]["prompt"] == "a a a a"
    assert content["rewards"][words]["unit"] == "score"
    assert len(content["rewards"][words]["version"]) == 12


def test_a_reward_that_does_not_apply_is_missing_not_zero(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gold metric needs a colour in the labels; means are over the pictures that have a score."""
    Image.new("RGB", (64, 64), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (64, 64), (0, 255, 0)).save(folder / "green.png")
    rows = ["file,prompt,colour", "red.png,x,red", "green.png,x,"]
    (folder / "p.csv").write_text("\n".join(rows))
    pictures = [folder / "red.png", folder / "green.png"]
    for suffix in ("csv", "json"):
        out = folder / f"s.{suffix}"
        score(monkeypatch, "--rewards", "background-accuracy", "--prompts", folder / "p.csv", *pictures, "--out", out)
    assert [line.rpartition(",")[2] for line in (folder / "s.csv").read_text().splitlines()[1:]] == ["1.0", ""]
    assert [p["scores"] for p in store.read_json(folder / "s.json")["pictures"]] == [{"background-accuracy": 1.0}, {}]
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:4]] == ["1", "-", "1"]


def test_weights_are_given_as_to_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward with a setting and weights from a file; its version tells these weights from others."""
    from safetensors.torch import save_file

    save_file({"weight": torch.tensor([2.0])}, folder / "weight.safetensors")
    plugin = Path(__file__).parent / "engine" / "weighted.py"
    name = f"{plugin}:Weighted[target=0.25]"
    out = folder / "s.json"
    given = f"{plugin}:Weighted={folder / 'weight.safetensors'}"
    Image.new("RGB", (8, 8), (51, 51, 51)).save(folder / "a.png")
    score(monkeypatch, "--rewards", name, "--reward-weights", given, "--prompt", "", folder / "a.png", "--out", out)
    content = store.read_json(out)
    assert content["pictures"][0]["scores"][name] == pytest.approx(-2 * (0.2 - 0.25) ** 2, rel=1e-4)
    assert content["rewards"][name]["version"].startswith("3+")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rewards jpeg-bytes pictures", "say once what the pictures are of"),
        ("--rewards jpeg-bytes --prompt a --prompts p.csv pictures", "say once what the pictures are of"),
        ("--rewards jpeg-bytes --prompt a --out scores.xlsx pictures", "written as .csv or .json"),
        ("--rewards jpeg-byte --prompt a pictures", "did you mean 'jpeg-bytes'"),
        ("--rewards , --prompt a pictures", "names no reward"),
        ("--rewards jpeg-bytes --prompt a nowhere", "there is no picture or folder nowhere"),
        ("--rewards jpeg-bytes --prompt a functions.py", "functions.py cannot be read as a picture"),
        ("--rewards jpeg-bytes --prompt a --device gpu pictures", "--device 'gpu'"),
    ],
)
def test_mistakes_are_explained_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    """Exit code 2 and nothing written."""
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    monkeypatch.setattr(sys, "argv", ["harness", "score", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert set(folder.iterdir()) == before
