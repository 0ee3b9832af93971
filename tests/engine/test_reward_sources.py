"""How a reward is named, where its weights come from, and that nothing is spent before they are known to fit."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from harness import store
from harness.config import split_outside_brackets
from harness.errors import UserError
from harness.grid import parse_reward
from harness.reward_sources import RewardSource, find_all, find_reward, parse_settings, parse_weights
from tests.engine.fakes import Bench

CPU = torch.device("cpu")


@pytest.fixture
def weighted(tmp_path: Path) -> str:
    """The reward of `weighted.py` without its settings; its weights are beside it, in `weights/`."""
    plugin = shutil.copy(Path(__file__).with_name("weighted.py"), tmp_path / "weighted.py")
    write(tmp_path / "weights", weight=torch.tensor([2.0]))
    return f"{plugin}:Weighted"


def write(folder: Path, name: str = "weight.safetensors", **tensors: torch.Tensor) -> Path:
    """A file of weights."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return folder / name


def find(weighted: str, weights: Path | str | None, settings: str = "[target=0.5]") -> RewardSource:
    """The reward with its weights from there."""
    return find_reward(weighted + settings, {} if weights is None else {weighted: str(weights)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("emoji-3d", ("emoji-3d", {})),
        ("c[target=goldfish]", ("c", {"target": "goldfish"})),
        ("c[target=1, model=a.b-c]", ("c", {"target": 1, "model": "a.b-c"})),
        ("c[remove=hat,red tie,add=dog]", ("c", {"remove": "hat,red tie", "add": "dog"})),
    ],
)
def test_settings_in_brackets(text: str, expected: tuple[str, dict[str, Any]]) -> None:
    """Values are YAML scalars; a comma that no `key=` follows is part of the value."""
    assert parse_settings(text) == expected


@pytest.mark.parametrize("text", ["c[target]", "c[target=1", "c[a=1,a=2]", "c[]", "c[a=[]"])
def test_brackets_that_are_not_understood(text: str) -> None:
    """The form is shown."""
    with pytest.raises(UserError, match=r"not understood|no YAML"):
        parse_settings(text)


def test_brackets_protect_commas_and_plus_signs() -> None:
    """Lists and sums of rewards are split outside of brackets only."""
    assert split_outside_brackets("a[x=1,y=2],b", ",") == ["a[x=1,y=2]", "b"]
    assert parse_reward("2*a[x=1+2]+b") == [(2.0, "a[x=1+2]"), (1.0, "b")]


def test_weights_by_name_and_by_expression() -> None:
    """The first equals sign outside of brackets divides; a name that no reward has is refused with the nearest."""
    assert parse_weights(["jpeg-bytes=a/b.pt", "jpeg-bytes[x=1]=c=d"]) == {
        "jpeg-bytes": "a/b.pt",
        "jpeg-bytes[x=1]": "c=d",
    }
    with pytest.raises(UserError, match=r"there is no reward 'jpeg-byte'.*jpeg-bytes"):
        parse_weights(["jpeg-byte=a.pt"])
    with pytest.raises(UserError, match="not understood"):
        parse_weights(["jpeg-bytes"])


def test_a_file_and_a_directory_are_the_same(weighted: str, tmp_path: Path) -> None:
    """A file stands for the first that is needed, whatever it is called; the others lie beside it."""
    folder = tmp_path / "weights"
    renamed = write(tmp_path / "other", "published.safetensors", weight=torch.tensor([2.0]))
    (renamed.parent / "config.json").write_text("{}")
    assert find(weighted, folder).files == {"weight.safetensors": folder / "weight.safetensors"}
    source = find(weighted, renamed)
    assert source.files == {"weight.safetensors": renamed, "config.json": renamed.parent / "config.json"}
    pictures = torch.full((1, 3, 2, 2), 0.75, requires_grad=True)
    assert source.build(CPU)(pictures, []).item() == pytest.approx(-2 * 0.25**2)


def test_the_version_is_that_of_code_and_weights(weighted: str, tmp_path: Path) -> None:
    """The same content elsewhere is the same version, other weights are another."""
    first = find(weighted, tmp_path / "weights")
    write(tmp_path / "copy", weight=torch.tensor([2.0]))
    changed = write(tmp_path / "changed", weight=torch.tensor([2.5]))
    assert first.version.startswith("3+")
    assert find(weighted, tmp_path / "copy").version == first.version
    assert find(weighted, changed).version != first.version
    assert find(weighted, changed).sha256 == {
        "weight.safetensors": hashlib.sha256(changed.read_bytes()).hexdigest(),
    }


def test_what_is_missing_is_said(weighted: str, tmp_path: Path) -> None:
    """Setting, file, directory, weights on a reward that has none: each says what would be right."""
    with pytest.raises(UserError, match=r"there is no setting .*targt; .*target"):
        find(weighted, tmp_path / "weights", "[targt=1]")
    with pytest.raises(UserError, match=r"target must be given"):
        find(weighted, tmp_path / "weights", "")
    with pytest.raises(UserError, match=r"no such file or directory.*example\.org \(MIT\)"):
        find(weighted, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no weight\.safetensors.*example\.org"):
        find(weighted, tmp_path / "empty")
    with pytest.raises(UserError, match="jpeg-bytes has no weights of its own"):
        find_reward("jpeg-bytes", {"jpeg-bytes": "a.pt"})
    with pytest.raises(UserError, match="jpeg-bytes has no settings"):
        find_reward("jpeg-bytes[quality=3]", {})


def test_weights_of_the_hub(weighted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by id and revision; offline it is said what to do; another content than published is refused."""
    asked: list[tuple[str, str, str | None]] = []
    fetching: list[bool] = []

    def download(repo: str, name: str, revision: str | None = None, local_files_only: bool = False) -> str:
        fetching.append(not local_files_only)
        asked.append((repo, name, revision))
        if repo == "nobody/weighted" and name == "weight.safetensors" and not offline:
            return str(tmp_path / "weights" / name)
        if repo == "me/mine" and name == "weight.safetensors":
            return str(tmp_path / "weights" / name)
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    offline = True
    with pytest.raises(UserError, match=r"needs the file weight\.safetensors.*example\.org.*--reward-weights"):
        find(weighted, None)
    offline = False
    with pytest.raises(UserError, match=r"is not the published weight\.safetensors: its sha256 should be 0000"):
        find(weighted, None)
    assert asked[-1] == ("nobody/weighted", "weight.safetensors", "abc")
    source = find(weighted, "me/mine@v2")
    assert asked[-2:] == [("me/mine", "weight.safetensors", "v2"), ("me/mine", "config.json", "v2")]
    assert list(source.files) == ["weight.safetensors"]
    assert all(fetching)


def test_nothing_is_spent_on_weights_that_do_not_fit(bench: Bench, weighted: str, tmp_path: Path) -> None:
    """The run ends before its directory is made."""
    write(tmp_path / "weights", other=torch.zeros(1))
    with pytest.raises(UserError, match=r"has \['other'\]; expected weight"):
        bench.run(rewards=[f"{weighted}[target=0.5]"], reward_weights={weighted: str(tmp_path / "weights")})
    assert not (tmp_path / "run").exists()


def test_rewards_added_for_evaluation_only_score(bench: Bench, weighted: str, tmp_path: Path) -> None:
    """An evaluation reward that is added scores finished cells; other weights are refused with the difference."""
    weights = {weighted: str(tmp_path / "weights")}
    name = f"{weighted}[target=0.25]"
    before = bench.run(methods=["draft"])
    trained = (before / "cells").glob("*/updates.jsonl")
    logs = {path: path.read_bytes() for path in trained}
    run = bench.run(methods=["draft"], evaluation_rewards=[name], reward_weights=weights)
    assert run == before
    assert logs
    assert all(path.read_bytes() == content for path, content in logs.items())
    for path in (run / "cells").iterdir():
        scores = pd.read_parquet(path / "scores.parquet")
        assert {name, bench.reward("Quadratic")} <= set(scores["reward"])
    recorded = {reward["name"]: reward for reward in store.read_json(run / "run.json")["rewards"]}
    assert recorded[name]["version"].startswith("3+")
    assert recorded[name]["weights_sha256"].keys() == {"weight.safetensors"}
    write(tmp_path / "weights", weight=torch.tensor([4.0]))
    with pytest.raises(UserError, match=r"made with other settings.*Weighted.*was '3\+"):
        bench.run(methods=["draft"], evaluation_rewards=[name], reward_weights=weights)


def test_training_in_bfloat16_leaves_evaluation_in_float32(bench: Bench, weighted: str, tmp_path: Path) -> None:
    """The training instance has the dtype that was asked for, the judge has not; it is another training."""
    from harness.config import resolve
    from harness.grid import Grid
    from harness.workshop import Workshop
    from tests.engine.fakes import settings

    name = f"{weighted}[target=0.5]"
    common: dict[str, Any] = {"rewards": [name], "reward_weights": {weighted: str(tmp_path / "weights")}}
    grids = [
        Grid(resolve(settings(bench.plugins, tmp_path / "run", reward_dtype=dtype, **common)))
        for dtype in ("float32", "bfloat16")
    ]
    workshop = Workshop(grids[1])
    assert vars(workshop.training_rewards[name])["dtype"] == torch.bfloat16
    assert vars(workshop.evaluator.rewards[name])["dtype"] == torch.float32
    assert grids[0].cells[1].training_hash != grids[1].cells[1].training_hash
    assert grids[0].cells[1].evaluation_hash == grids[1].cells[1].evaluation_hash


def test_all_are_those_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that lack weights or settings are left out, and it is said why; nothing is fetched for them."""

    def download(repo: str, name: str, revision: str | None = None, local_files_only: bool = False) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not cached")

    asked: list[bool] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found, left_out = find_all("any", {})
    assert set(asked) == {True}
    assert {"jpeg-bytes", "jpeg-compressibility"} <= found.keys()
    assert "emoji-3d" not in {*found, *left_out}
    assert all(why for why in left_out.values())
    assert "emoji-3d" in find_all("emoji", {})[0]


def test_weights_that_are_given_are_never_left_out(tmp_path: Path) -> None:
    """Where `all` is asked for, too: they were meant. Only a reward that lacks a setting may be missing."""
    (tmp_path / "file.pt").write_bytes(b"hello, this is no checkpoint")
    with pytest.raises(UserError, match=r"file\.pt"):
        find_all("any", {"aesthetic": str(tmp_path / "file.pt")})
    assert "must be given" in find_all("any", {"classifier": str(tmp_path / "file.pt")})[1]["classifier"]


def test_weights_for_other_settings_are_no_reason_to_take_published_ones(weighted: str, tmp_path: Path) -> None:
    """Who gives weights for one expression and none for another has probably misspelt it."""
    weights = {f"{weighted}[target=1]": str(tmp_path / "weights")}
    assert find_reward(f"{weighted}[target=1]", weights).files
    with pytest.raises(UserError, match=r"but not those of .*\[target=2\]"):
        find_reward(f"{weighted}[target=2]", weights)


def test_weights_in_a_file_of_settings_are_of_rewards_that_exist(bench: Bench) -> None:
    """As those on the command line."""
    with pytest.raises(UserError, match=r"there is no reward 'hpsv9'; did you mean"):
        bench.run(rewards=["jpeg-compressibility"], reward_weights={"hpsv9": "a.pt"})


def test_a_misspelt_path_is_told_from_an_id_of_the_hub(weighted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`folder/file` has the form of both."""

    def download(repo: str, name: str, revision: str | None = None, local_files_only: bool = False) -> str:
        raise LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"there is no file or directory folder/file\.pt, and as an id of the hub"):
        find(weighted, "folder/file.pt")


def test_another_repository_has_not_the_files_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id that is given stands for the weights' own repository; the vocabulary stays where it is published."""
    asked: dict[str, tuple[str, str | None]] = {}

    def download(repo: str, name: str, revision: str | None = None, local_files_only: bool = False) -> str:
        asked[name] = (repo, revision)
        (tmp_path / name).write_text("")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"is not the published vocab\.txt"):
        find_reward("imagereward", {"imagereward": "me/mine@v2"})
    assert asked["ImageReward.pt"] == ("me/mine", "v2")
    assert asked["vocab.txt"][0] not in ("", "me/mine")


def test_weights_that_change_while_a_run_goes(bench: Bench, weighted: str, tmp_path: Path) -> None:
    """A worker that finds other weights than the plan was made with trains nothing."""
    from harness.config import resolve
    from harness.executors.local import serve
    from harness.grid import Grid
    from tests.engine.fakes import Inline, settings

    common: dict[str, Any] = {
        "rewards": [f"{weighted}[target=0.5]"],
        "reward_weights": {weighted: str(tmp_path / "weights")},
    }
    config = resolve(settings(bench.plugins, tmp_path / "run", **common))
    planned = Grid(config).cells
    write(tmp_path / "weights", weight=torch.tensor([3.0]))
    connection = Inline(list(planned), lambda event: None)
    serve(connection, config, tmp_path / "run")  # type: ignore[arg-type]
    assert set(connection.ends.values()) == {"crashed"}
    assert "changed while the run was going" in (tmp_path / "run" / "cells" / "base" / "error.txt").read_text()
    assert not list((tmp_path / "run").rglob("*.parquet"))
