"""What `python -m harness evaluate` asks for, as the settings of a run whose arms were made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import store
from harness.config import EMBEDDED_MODEL, merge
from harness.errors import UserError, nearest
from harness.registry import find_model, reward_names
from harness.reward_sources import HUB_ID, find_all

LORA_FILE = "pytorch_lora_weights.safetensors"
# Of a run that is joined: what its cells were made with, and a command cannot change.
JOINED = (
    *("model", "revision", "suite", "preset", "sampler", "adapter", "evaluation", "dtype", "budget", "rewards"),
    *("evaluation_rewards", "early_stopping", "probes", "reward_dtype", "denoiser"),
)
ROLES = ("proxy", "held-out", "gold")
# What a preset may say about arms of its own, which are not here.
WITHOUT_ARMS: Mapping[str, Any] = {"methods": [], "seeds": [0], "findings": [], "reference": None, "mixes": []}


@dataclass(frozen=True)
class Wanted:
    """What the command line names.

    Attributes:
        adapters: `PATH` or `label=PATH`.
        folders: Of pictures, as `adapters`.
        prompts: File that says which prompt each picture is of.
        scales: Strengths of each adapter, as `0.5,1`.
        rewards: Who judges; the first is the tables' first. `all`: those at hand.
    """

    adapters: tuple[str, ...]
    folders: tuple[str, ...]
    prompts: Path | None
    scales: str
    rewards: tuple[str, ...]


def settings(
    wanted: Wanted, flags: Mapping[str, Any], overrides: Mapping[str, Any], into: Path | None
) -> dict[str, Any]:
    """The settings of the run, for `harness.config.resolve`.

    Raises:
        UserError: Nothing to judge, or something that contradicts the run that is joined.
    """
    arms = [*_adapters(wanted), *_folders(wanted)]
    if not arms:
        raise UserError("nothing to evaluate: give --lora PATH, or --images FOLDER with --prompts FILE")
    if not wanted.rewards:
        raise UserError("--rewards names no reward; see `python -m harness list rewards`")
    own: dict[str, Any] = {**WITHOUT_ARMS, "arms": arms, "timing": False}
    if into is None:
        passed = merge(merge(flags, overrides), {**own, "variants": [], "early_stopping": None, "probes": []})
        return {**passed, **_judges(wanted, passed)}
    stored = store.read_json(into / "run.json")
    given = [key for key in {**flags, **overrides} if key in (*JOINED, "out")]
    if given:
        raise UserError(f"--into {into}: {', '.join(given)} is that of the run; leave it out")
    _refuse_labels_of_others([str(arm["label"]) for arm in arms], stored, into)
    kept = {key: stored["config"][key] for key in JOINED if key in stored["config"]}
    weights = {**stored["config"].get("reward_weights", {}), **flags["reward_weights"]}
    if wanted.rewards != ("all",):
        kept["rewards"] = [_known(name, stored["training_rewards"]) for name in wanted.rewards]
    joined = {**kept, **own, "variants": [], "out": str(into), "reward_weights": weights}
    return merge(joined, {key: value for key, value in {**flags, **overrides}.items() if key != "reward_weights"})


def _refuse_labels_of_others(labels: list[str], stored: Mapping[str, Any], into: Path) -> None:
    others = {str(arm["label"]) for arm in stored["arms"] if arm.get("kind") != "given"}
    if taken := [label for label in labels if label in others]:
        raise UserError(f"--into {into}: the run has an arm {taken[0]!r} of its own; give another label, label=PATH")


def _known(name: str, trained: list[str]) -> str:
    if name not in trained:
        raise UserError(
            f"--into: the run trained on {', '.join(trained)}, and --rewards says beside which of them the arms stand; "
            f"{name!r} is none; {nearest(name, trained)}"
        )
    return name


def _judges(wanted: Wanted, passed: Mapping[str, Any]) -> dict[str, Any]:
    """The first reward is what tables are about, and stands where a trained arm's training reward would."""
    names = list(wanted.rewards)
    if "all" in names:
        family = find_model(str(passed.get("model", EMBEDDED_MODEL)), passed.get("revision")).family
        found, usual = find_all(family, passed["reward_weights"])[0], reward_names(family)
        # Those that need weights were meant by whoever has them; then what can be trained on, and what only judges.
        order = sorted(found, key=lambda name: (name in usual, ROLES.index(found[name].reward.role)))
        names = [name for name in names if name != "all"] + order
    return {"rewards": names[:1], "evaluation_rewards": list(dict.fromkeys(names[1:]))}


def _adapters(wanted: Wanted) -> list[dict[str, Any]]:
    try:
        scales = [float(word) for word in wanted.scales.split(",") if word.strip()]
    except ValueError:
        raise UserError(f"--scale {wanted.scales!r}: write numbers, as 1 or 0.5,1") from None
    arms = []
    for text in wanted.adapters:
        label, path = _labelled(text)
        for scale in scales:
            name = label if scales == [1.0] else f"{label} x{scale:g}"
            overrides: dict[str, Any] = {"path": str(_local(path)), "scale": scale}
            arms.append({"label": name, "method": "given-adapter", "overrides": overrides})
    return arms


def _folders(wanted: Wanted) -> list[dict[str, Any]]:
    if wanted.folders and wanted.prompts is None:
        raise UserError("--images needs --prompts: a .csv or .jsonl file that says which prompt each picture is of")
    arms = []
    for text in wanted.folders:
        label, path = _labelled(text)
        overrides = {"path": path, "prompts": str(wanted.prompts)}
        arms.append({"label": label, "method": "given-pictures", "overrides": overrides})
    return arms


def _labelled(text: str) -> tuple[str, str]:
    """`label=PATH`, or a path that is its own label."""
    places = [i for i, character in enumerate(text) if character == "="]
    if places and not Path(text).exists():
        # A label may have an equals sign as well: K=5=path.
        i = next((i for i in places if Path(text[i + 1 :]).exists()), places[0])
        return text[:i], text[i + 1 :]
    place = Path(text)
    if place.name == LORA_FILE:
        place = place.parent
    return (place.stem if place.is_file() else place.name) or text, text


def _local(path: str) -> Path:
    """A path as it is; an adapter of the hub from its cache, or from the hub.

    Raises:
        UserError: Neither.
    """
    if Path(path).exists() or not HUB_ID.fullmatch(path):
        return Path(path)
    from huggingface_hub import hf_hub_download

    repo, _, revision = path.partition("@")
    try:
        return Path(hf_hub_download(repo, LORA_FILE, revision=revision or None))
    except Exception as error:  # the hub's client raises many kinds, of several libraries
        raise UserError(
            f"--lora {path}: there is no such file or directory, and the hub has no {LORA_FILE} of that name that can "
            f"be reached or is cached ({type(error).__name__})"
        ) from error
