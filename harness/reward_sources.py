"""From a reward's name on the command line to an instance: its settings, its files of weights, and what identifies it.

`classifier[target=goldfish]` is the reward `classifier` with one setting; `--reward-weights hpsv2.1=path/to/file.pt`
says where weights are. Without it they come from the hub's cache, or from the hub.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from harness.config import explain
from harness.errors import UserError, nearest
from harness.registry import discover, load_reward
from harness.rewarding import ConfiguredReward, Reward, RewardConfig, WeightFile

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


class _SettingsError(UserError):
    """A setting is unknown, wrong or not given."""


@dataclass(frozen=True)
class RewardSource:
    """A reward that can be built.

    Attributes:
        name: As asked for, settings included; its name in records.
        reward: Its class.
        config: Its settings; None where it has none.
        files: Where its files are, by name.
        sha256: Of each of them.
    """

    name: str
    reward: type[Reward]
    config: RewardConfig | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The class's version; with files, also the start of a hash over their contents: `1+3fa29c01`."""
        if not self.sha256:
            return self.reward.version
        content = "".join(f"{name} {value}\n" for name, value in sorted(self.sha256.items()))
        return f"{self.reward.version}+{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def build(self, device: torch.device, dtype: torch.dtype | None = None) -> Reward:
        """An instance on a device, in float32 unless another dtype is given (which only training may do).

        Raises:
            UserError: Files do not hold what is expected.
        """
        if not issubclass(self.reward, ConfiguredReward):
            return self.reward(device)
        arguments = {} if dtype is None else {"dtype": dtype}
        instance: Reward = self.reward(device, self.config, self.files, **arguments)
        return instance

    def check(self) -> None:
        """Compare its files with what it expects, without loading them.

        Raises:
            UserError: They do not hold what is expected.
        """
        if self.files:
            import torch

            self.build(torch.device("meta"))


def find_reward(expression: str, weights: Mapping[str, str], *, download: bool = True) -> RewardSource:
    """The reward that an expression names, its files located and hashed.

    Args:
        expression: `hpsv2.1`, `classifier[target=goldfish]`, `path/to/file.py:Class`.
        weights: Where weights are, by expression or by bare name: a file, a directory, or `owner/name@revision`.
        download: Whether files may be fetched from the hub that its cache does not have.

    Raises:
        UserError: Unknown name or setting, a file is missing, or weights are given for other settings only.
    """
    name, settings = parse_settings(expression)
    reward = load_reward(name)
    if not issubclass(reward, ConfiguredReward):
        if settings:
            raise UserError(f"{name} has no settings; write it without brackets")
        if name in weights:
            raise UserError(f"--reward-weights {name}=...: {name} has no weights of its own")
        return RewardSource(expression, reward)
    try:
        config = reward.Config.model_validate(settings)
    except ValidationError as error:
        raise _SettingsError(explain(error, reward.Config, f"{name}.")) from None
    given = weights.get(expression, weights.get(name))
    wanted = reward.files(config)
    if wanted and given is None and (others := [key for key in weights if key.startswith(f"{name}[")]):
        raise UserError(
            f"--reward-weights says where those of {others[0]} are, but not those of {expression}; give {expression}="
            f"PLACE, or {name}=PLACE for both"
        )
    files = locate(expression, wanted, given, download=download)
    return RewardSource(expression, reward, config, files, {file: _sha256(path) for file, path in files.items()})


def find_all(family: str, weights: Mapping[str, str]) -> tuple[dict[str, RewardSource], dict[str, str]]:
    """Every reward that makes sense on a model family and whose files are there, and why others are left out.

    Rewards without a default for a setting are among the latter.

    Raises:
        UserError: Weights that are given do not fit: they were meant to be used.
    """
    found: dict[str, RewardSource] = {}
    left_out: dict[str, str] = {}
    for name, plugin in discover("rewards").items():
        if plugin.attributes.get("family", "any") in ("any", "named", family):
            try:
                source = find_reward(name, weights, download=name in weights)
                source.check()
            except UserError as error:
                if name in weights and not isinstance(error, _SettingsError):
                    raise
                left_out[name] = str(error)
            else:
                found[name] = source
    return found, left_out


def parse_settings(expression: str) -> tuple[str, dict[str, Any]]:
    """`classifier[target=goldfish]` is (`classifier`, {target: goldfish}); values are YAML scalars.

    Raises:
        UserError: The brackets have another form.
    """
    name, bracket, rest = expression.partition("[")
    if not bracket:
        return expression, {}
    settings: dict[str, Any] = {}
    # A comma without a further `key=` belongs to the value: remove=hat,glasses.
    for item in re.split(r",(?=[^,=]+=)", rest.removesuffix("]")):
        key, equals, value = item.partition("=")
        if not equals or not rest.endswith("]") or key.strip() in settings:
            raise UserError(f"the reward {expression!r} is not understood: write name[key=value,key=value]")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"the reward {expression!r}: the value {value!r} is no YAML scalar") from None
    return name.strip(), settings


def parse_weights(items: Sequence[str]) -> dict[str, str]:
    """`hpsv2.1=path/to/file.pt` and more.

    Raises:
        UserError: An item has another form, or names no reward.
    """
    result: dict[str, str] = {}
    for item in items:
        # The last `=` outside brackets: settings have their own.
        match = re.fullmatch(r"([^\[\]=]+(?:\[[^\]]*\])?)=(.+)", item)
        if not match:
            raise UserError(f"--reward-weights {item!r} is not understood: write hpsv2.1=path/to/file.pt")
        bare = parse_settings(match[1].strip())[0]
        known = list(discover("rewards"))
        if bare not in known and ".py:" not in bare:
            raise UserError(f"--reward-weights {item!r}: there is no reward {bare!r}; {nearest(bare, known)}")
        result[match[1].strip()] = match[2].strip()
    return result


def locate(name: str, wanted: tuple[WeightFile, ...], given: str | None, *, download: bool) -> dict[str, Path]:
    """Where the files of a reward are.

    Args:
        name: Of the reward, for messages.
        wanted: What it needs.
        given: What `--reward-weights` says of it: a file (which stands for the first one; the others lie beside it), a
            directory, a hub id with or without a revision, or None for the published hub id.
        download: As in `find_reward`.

    Raises:
        UserError: A file that is not optional is missing, or one from the hub is not the published one.
    """
    if not wanted:
        if given is not None:
            raise UserError(f"--reward-weights {name}={given}: {name} needs no weights with these settings")
        return {}
    if given is None:
        return {
            file.name: path for file in wanted if (path := _from_hub(name, file, file.repo, file.revision, download))
        }
    place = Path(given).expanduser()
    if not place.exists() and HUB_ID.fullmatch(given):
        repo, _, revision = given.partition("@")
        # Files of another publisher, such as a vocabulary, are not in this one's repository.
        published = {file: (file.repo, file.revision) for file in wanted if file.repo not in ("", wanted[0].repo)}
        places = {file: published.get(file, (repo, revision)) for file in wanted}
        try:
            return {file.name: path for file in wanted if (path := _from_hub(name, file, *places[file], download))}
        except UserError as error:
            raise UserError(f"there is no file or directory {given}, and as an id of the hub: {error}") from None
    if not place.exists():
        raise UserError(f"--reward-weights {name}={given}: there is no such file or directory{_where(wanted[0])}")
    folder = place if place.is_dir() else place.parent
    found = {file.name: folder / file.name for file in wanted if (folder / file.name).is_file()}
    if not place.is_dir():
        found[wanted[0].name] = place
    for file in wanted:
        if file.name not in found and not file.optional:
            raise UserError(f"--reward-weights {name}={given}: {folder} has no {file.name}{_where(file)}")
    return found


def _from_hub(name: str, file: WeightFile, repo: str, revision: str, download: bool) -> Path | None:
    """A file from the hub's cache or the hub; None for an optional one that is not published."""
    if repo:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            place = hf_hub_download(repo, file.name, revision=revision or None, local_files_only=not download)
            path = Path(place)
        except EntryNotFoundError as error:  # offline, a file that is not in the cache is one, too
            reason = f"{repo} has no {file.name} that can be reached or is cached ({type(error).__name__})"
        except Exception as error:  # the hub's client raises many kinds, of several libraries
            reason = f"{repo} cannot be reached and {file.name} is not cached ({type(error).__name__})"
        else:
            if file.sha256 and file.repo == repo and _sha256(path) != file.sha256:
                raise UserError(f"{path} is not the published {file.name}: its sha256 should be {file.sha256}")
            return path
    else:
        reason = "it is on no hub"
    if file.optional:
        return None
    option = f"--reward-weights '{name}=PATH'" if "[" in name else f"--reward-weights {name}=PATH"
    raise UserError(f"{name} needs the file {file.name}: {reason}{_where(file)}. Give it with {option}")


def _where(file: WeightFile) -> str:
    known = f", sha256 {file.sha256}" if file.sha256 else ""
    return f"; {file.name} is published at {file.where}{known}" if file.where else ""


def _sha256(path: Path) -> str:
    state = path.stat()
    return _sha256_of(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256_of(path: Path, size: int, modified: int) -> str:
    """Hashed again only where size or time of the file changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
