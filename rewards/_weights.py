"""How rewards read published weights: no pickle is executed, and nothing is loaded that does not fit."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.api import UserError, reading_tensors

SHOWN = 4  # names in a message


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, mapped rather than read where the format allows.

    Safetensors, or what `torch.save` wrote, read with `weights_only=True`; a dictionary nested under `state_dict`
    stands for the whole.

    Raises:
        UserError: It cannot be read so.
    """
    with reading_tensors(path, "weights"):
        if path.suffix == ".safetensors":
            loaded: dict[str, Tensor] = load_file(path)
            return loaded
        mappable = zipfile.is_zipfile(path)  # what was saved before torch 1.6 is not
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no dictionary of tensors; expected a state_dict")
    return dict(content)


def read_config(path: Path | None, default: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture of a `config.json`, or the published one where there is none.

    Raises:
        UserError: It is no JSON object.
    """
    if path is None:
        return dict(default)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; expected the architecture of the weights beside it")
    return content


def build_strictly(
    build: Callable[[], nn.Module], state: Mapping[str, Tensor], path: Path, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A frozen network in evaluation mode with exactly these weights; on the `meta` device they are only compared.

    Args:
        build: Makes the network; its parameters are never initialised.
        state: Weights under the names of the network.
        path: Where they are from, for messages.
        device: Where to put it.
        dtype: Of its parameters.

    Raises:
        UserError: Names or shapes differ; says which.
    """
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        network = build()
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [
        _named("lacks", [f"{name} {expected[name]}" for name in expected if name not in found]),
        _named("has besides", [f"{name} {found[name]}" for name in found if name not in expected]),
        _named(
            "has other shapes:",
            [
                f"{name} {found[name]} instead of {expected[name]}"
                for name in expected
                if name in found and found[name] != expected[name]
            ],
        ),
    ]
    if any(problems):
        raise UserError(
            f"{path} does not fit the architecture ({len(expected)} tensors expected, {len(found)} found): it "
            + "; ".join(filter(None, problems))
            + ". A config.json beside it says another architecture; without one it is the published one"
        )
    network.eval().requires_grad_(False)
    if device.type != "meta":
        network.load_state_dict(dict(state), assign=True)
        network.requires_grad_(False).to(device, dtype)
    return network


def _named(what: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} {', '.join(names[:SHOWN])}{more}" if names else ""
