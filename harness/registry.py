"""Finds plug-ins: files in methods/, rewards/ and prompts/, installed entry points, or `path/to/file.py:Name`.

Listing reads source with `ast` and imports nothing, so it is fast and shows a broken plug-in too.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.config import DenoiserConfig
from harness.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

    from harness.api import DiffusionModel, Embedding, FineTuner, Reward
    from harness.prompts import PromptSuite

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"methods": "methods", "rewards": "rewards", "embeddings": "rewards", "suites": "prompts"}
BASES = {"rewards": {"Reward", "ConfiguredReward"}, "embeddings": {"Embedding"}}
METHOD_KINDS = {"TrainedFineTuner": "training", "InferenceFineTuner": "inference"}


@dataclass(frozen=True)
class Plugin:
    """A plug-in as its source shows it.

    Attributes:
        name: On the command line.
        module: To import.
        symbol: Class or function in it.
        description: First line of its docstring.
        attributes: Literal class attributes (version, role, unit ...); of a method also its `kind`, where the source
            tells: training or inference.
    """

    name: str
    module: str
    symbol: str
    description: str
    attributes: dict[str, Any]


def discover(kind: str) -> dict[str, Plugin]:
    """All plug-ins of `methods`, `rewards`, `embeddings` or `suites` by name, from the folder and from entry points."""
    found: dict[str, Plugin] = {}
    bases: dict[str, list[str]] = {}
    for path in sorted((ROOT / FOLDERS[kind]).glob("*.py")):  # underscore files, which others build on, come first
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        bases |= _bases(tree)
        if not path.name.startswith("_"):
            for plugin in _read(tree, f"{FOLDERS[kind]}.{path.stem}", kind, bases):
                found[plugin.name] = plugin
    for entry in entry_points(group=f"draft_bench.{kind}"):
        found[entry.name] = Plugin(entry.name, entry.module, entry.attr, f"from the package {entry.module}", {})
    return found


def _read(tree: ast.Module, module: str, kind: str, bases: dict[str, list[str]]) -> list[Plugin]:
    default = module.partition(".")[2].replace("_", "-")
    if kind == "suites":
        description = (ast.get_docstring(tree) or "").split("\n")[0]
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        return [Plugin(default, module, "suite", description, {})] if "suite" in functions else []
    plugins = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and (kind not in BASES or BASES[kind] & set(_above(node.name, bases))):
            attributes = _literals(node)
            if "version" in attributes:
                if kind == "methods":
                    attributes["kind"] = _method_kind(node.name, bases)
                description = (ast.get_docstring(node) or "").split("\n")[0]
                plugins.append(Plugin(attributes.get("name", default), module, node.name, description, attributes))
    return plugins


def _bases(tree: ast.Module) -> dict[str, list[str]]:
    """Names of the classes that each class of a file subclasses, type arguments left out."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: [ast.unparse(base).partition("[")[0] for base in node.bases] for node in classes}


def _method_kind(name: str, bases: dict[str, list[str]]) -> str:
    """What a class is in the end."""
    return next((METHOD_KINDS[one] for one in _above(name, bases) if one in METHOD_KINDS), "")


def _above(name: str, bases: dict[str, list[str]]) -> list[str]:
    """A class and what it subclasses, as far as the classes in `bases` tell."""
    above = [name]
    for one in above:
        above += [base for base in bases.get(one, []) if base not in above]
    return above


def _literals(node: ast.ClassDef) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Constant):
            values.update({target.id: value.value for target in targets if isinstance(target, ast.Name)})
    return values


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"plugin_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"the plug-in file {path} does not exist or is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic resolves annotations through sys.modules
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the plug-in file {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _load(kind: str, name: str) -> Any:
    path, colon, symbol = name.partition(":")
    if path.endswith(".py"):
        if not colon:
            raise UserError(f"{name!r}: name the class too, as path/to/file.py:ClassName")
        module = _import_file(Path(path))
        if not hasattr(module, symbol):
            raise UserError(f"{path} has no {symbol}; {nearest(symbol, [n for n in vars(module) if n[0] != '_'])}")
        return getattr(module, symbol)
    plugins = discover(kind)
    if name not in plugins:
        raise UserError(f"there is no {kind[:-1]} {name!r}; {nearest(name, list(plugins))}")
    plugin = plugins[name]
    return getattr(importlib.import_module(plugin.module), plugin.symbol)


def load_method(name: str) -> type[FineTuner]:
    """The class of a method.

    Raises:
        UserError: Unknown name (the nearest is suggested), or not a concrete method.
    """
    from harness.api import InferenceFineTuner, TrainedFineTuner
    from harness.given import GIVEN

    if name in GIVEN:
        return GIVEN[name]
    found = _load("methods", name)
    if not (inspect.isclass(found) and issubclass(found, (TrainedFineTuner, InferenceFineTuner))):
        raise UserError(f"{name} is no method; subclass harness.api.TrainedFineTuner or InferenceFineTuner")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UserError(f"{name} is not complete: it must define {missing}")
    for attribute in ("version", "stochastic", "needs_reward_gradient", "Config"):
        if not hasattr(found, attribute):
            raise UserError(f"{name} lacks the class attribute {attribute} (see harness.api.FineTuner)")
    return found


def load_reward(name: str) -> type[Reward]:
    """The class of a reward, or one that calls a function (`harness.callables`).

    Raises:
        UserError: Unknown name (the nearest is suggested), or neither a Reward nor a function of pictures.
    """
    from harness.api import Reward

    found = _load("rewards", name)
    if inspect.isfunction(found):
        from harness.callables import reward_class

        return reward_class(found, name)
    if not (inspect.isclass(found) and issubclass(found, Reward)):
        raise UserError(
            f"{name} is no Reward; subclass harness.api.Reward, or give a function (docs/adding-a-reward.md)"
        )
    return found


def load_embedding(family: str) -> type[Embedding]:
    """The embedding made for a model family, else the one for any."""
    plugins = discover("embeddings").values()
    best = max(plugins, key=lambda plugin: plugin.attributes.get("family", "any") == family)
    found: type[Embedding] = getattr(importlib.import_module(best.module), best.symbol)
    return found


def load_suite(name: str) -> PromptSuite:
    """A suite by name, as `NAME=PATH` where its texts are the user's own copy, or from a user's .txt or .jsonl file.

    Raises:
        UserError: Unknown name, an unreadable file, or a path is missing or too much.
    """
    bare, equals, given = name.partition("=")
    has_copy = bool(equals) and bare in discover("suites")
    if name.endswith((".txt", ".jsonl")) and not has_copy:
        files: ModuleType = importlib.import_module("prompts._files")
        suite: PromptSuite = files.load(Path(name))
        return suite
    function = _load("suites", bare if has_copy else name)
    takes_copy = bool(inspect.signature(function).parameters)
    if has_copy and not takes_copy:
        raise UserError(f"the suite {bare} is complete as it is; write --suite {bare}")
    loaded: PromptSuite = function(given if has_copy else None) if takes_copy else function()
    return loaded


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are, and which family of rewards and suites it belongs to.

    Attributes:
        name: As given.
        location: Directory or hub id.
        family: Of rewards: `any`, or the name of the embedded model.
        module: The file of models/ that reads it.
    """

    name: str
    location: str
    family: str
    module: str


def find_model(name: str, revision: str | None = None) -> ModelSource:
    """An embedded model, a pipeline directory, a model without weights (`gaussian`), or a hub id.

    Raises:
        UserError: No such directory, or a pipeline class that no file of models/ reads.
    """
    readers = _model_readers()
    if name in readers and not readers[name]:
        return ModelSource(name, name, "any", f"models.{name}")
    embedded = embedded_models()
    location = str(embedded.get(name, name))
    if name not in embedded and not Path(name).exists() and name.count("/") != 1:
        choices = [*embedded, *(reader for reader, pipelines in readers.items() if not pipelines)]
        raise UserError(
            f"there is no model {name!r}: give a directory, a hub id (owner/name), or: {nearest(name, choices)}"
        )
    pipeline = _pipeline_class(location, revision)
    for reader, pipelines in readers.items():
        if pipeline in pipelines:
            return ModelSource(name, location, name if name in embedded else "any", f"models.{reader}")
    raise UserError(f"{location} is a {pipeline}; supported are {', '.join(pipeline_classes())}")


def pipeline_classes() -> list[str]:
    """Classes of diffusers pipelines that can be read."""
    return [pipeline for readable in _model_readers().values() for pipeline in readable]


def _model_readers() -> dict[str, tuple[str, ...]]:
    readers = {}
    for path in sorted((ROOT / "models").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "PIPELINES":
                readers[path.stem] = tuple(ast.literal_eval(node.value))
    return readers


def _pipeline_class(location: str, revision: str | None) -> str:
    if Path(location).is_dir():
        index = Path(location) / "model_index.json"
    else:
        from huggingface_hub import hf_hub_download

        try:
            index = Path(hf_hub_download(location, "model_index.json", revision=revision))
        except Exception as error:
            raise UserError(
                f"the model {location!r} is neither a directory nor a hub id that can be reached or is cached "
                f"({type(error).__name__}); give a directory written by `pipeline.save_pretrained`"
            ) from error
    try:
        return str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{location} holds no model_index.json of a diffusers pipeline") from error


def load_model(
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None,
    denoiser: DenoiserConfig = DenoiserConfig(),  # noqa: B008 - frozen
) -> DiffusionModel:
    """Read a model's weights onto a device.

    Raises:
        UserError: They cannot be read, or the model cannot compute as `denoiser` says.
    """
    module = importlib.import_module(source.module)
    for library in ("diffusers", "transformers"):  # their loading bars would tear ours
        if library in sys.modules:
            importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    model: DiffusionModel = module.load(source.location, device, dtype, revision)
    if denoiser != DenoiserConfig():
        model.configure(denoiser)
    return model


def default_suite(source: ModelSource) -> str:
    """The suite of a model: `<family>-animals` for an embedded one, else `animals`."""
    return f"{source.family}-animals" if source.family != "any" else "animals"


def embedded_models() -> dict[str, Path]:
    """Models whose weights are in the repository, by name."""
    return {path.parents[1].name: path.parent for path in sorted((ROOT / "models").glob("*/pipeline/model_index.json"))}


def reward_names(family: str) -> list[str]:
    """All rewards that make sense on a model family."""
    return [name for name, p in discover("rewards").items() if p.attributes.get("family", "any") in ("any", family)]
