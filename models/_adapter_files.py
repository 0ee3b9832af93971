"""LoRA files made elsewhere, whatever their layout, as factors by module of the denoiser.

What turns the names of other trainers into those of diffusers is diffusers' own code. What differs from
`pipeline.load_lora_weights`: nothing in a file is left unused, and each layer has its own alpha (diffusers gives
attention layers of files in kohya's layout the commonest one).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from harness.api import AdapterFile, UserError, reading_tensors
from models._lora import Factors, listed

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
METADATA = "lora_adapter_metadata"  # where diffusers keeps the LoraConfig in a safetensors header
COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")

# What of a LoraConfig is understood, or says nothing about how the weights act.
UNDERSTOOD = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size"),
    *("revision", "task_type", "fan_in_fan_out", "ensure_weight_tying", "target_modules", "exclude_modules"),
}
# Initialisations that leave the base weights as they are.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")

State = dict[str, Tensor]
Convert = Callable[[State], tuple[State, Mapping[str, float]]]


@dataclass(frozen=True)
class _Content:
    state: State
    metadata: dict[str, Any] | None


def read_adapter(path: Path, component: str, convert: Convert) -> tuple[dict[str, Factors], AdapterFile]:
    """The factors of an adapter by module name, and what the file is.

    Args:
        path: A file, or a directory that holds one: of diffusers, of peft, or any single .safetensors.
        component: `unet` or `transformer`.
        convert: The pipeline's own conversion of other trainers' names: tensors in, tensors and alphas out.

    Raises:
        UserError: There is no such file, it cannot be read without executing code, or something in it could not be
            used.
    """
    files = _locate(path)
    content = _read(files[-1])
    config = None
    if files[0].name == PEFT_CONFIG:
        kind = "peft"
        config = _peft_config(files[0])
        pairs = _pairs({key.removeprefix("base_model.model."): value for key, value in content.state.items()}, path)
        alphas: dict[str, float] = {}
    else:
        kind = _kind(content.state)
        pairs, alphas = _of_diffusers(content.state, component, convert, path)
        if content.metadata is not None:
            prefix = f"{component}."
            own = {key.removeprefix(prefix): v for key, v in content.metadata.items() if key.startswith(prefix)}
            config = _lora_config(own, path) if own else None
    if config is not None and alphas:
        raise UserError(f"{path} says alpha twice, in tensors and in its {METADATA}; keep one of them")
    scales = _scales(pairs, config, alphas, path)
    factors = {name: Factors(down, up, scales[name]) for name, (down, up) in pairs.items()}
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    ranks = tuple(sorted({pair.rank for pair in factors.values()}))
    return factors, AdapterFile(kind, digest, len(factors), ranks, tuple(sorted(set(scales.values()))))


# --------------- files


def _locate(path: Path) -> tuple[Path, ...]:
    """The files to read, the one with the weights last."""
    folder = path if path.is_dir() else path.parent
    if path.is_file():
        peft = path.name in PEFT_WEIGHTS and (folder / PEFT_CONFIG).is_file()
        return (folder / PEFT_CONFIG, path) if peft else (path,)
    if not path.is_dir():
        raise UserError(f"the adapter {path} does not exist; give a LoRA file, or a directory that holds one")
    if (folder / PEFT_CONFIG).is_file():
        for name in PEFT_WEIGHTS:
            if (folder / name).is_file():
                return (folder / PEFT_CONFIG, folder / name)
        raise UserError(f"{path} has an {PEFT_CONFIG} but neither {' nor '.join(PEFT_WEIGHTS)}")
    for name in DIFFUSERS_WEIGHTS:
        if (folder / name).is_file():
            return (folder / name,)
    others = sorted(folder.glob("*.safetensors"))
    if len(others) != 1:
        found = listed([file.name for file in others]) or "no .safetensors"
        raise UserError(
            f"which file of {path} is the adapter? Found {found}; expected {DIFFUSERS_WEIGHTS[0]} (diffusers), "
            f"{PEFT_CONFIG} with {PEFT_WEIGHTS[0]} (peft), or a single .safetensors. Give the file itself"
        )
    return (others[0],)


def _read(path: Path) -> _Content:
    with reading_tensors(path, "an adapter"):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = (file.metadata() or {}).get(METADATA)
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not iterable
            described = json.loads(metadata) if metadata else None
            if not isinstance(described, dict | None):
                raise ValueError(f"its {METADATA} is no object of JSON")
            return _Content(state, described)
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no dictionary of tensors, which the weights of an adapter are")
    return _Content(dict(content), None)


def _peft_config(path: Path) -> LoraConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        found = content.get("peft_type") if isinstance(content, dict) else None
        raise UserError(f"{path} describes a {found!r} adapter of peft; only LORA can be attached")
    return _lora_config(content, path)


def _lora_config(content: Mapping[str, Any], path: Path) -> LoraConfig:
    """Refuses whatever changes how the weights act and is not understood here."""
    default = LoraConfig().to_dict()
    strange = [
        f"{key}={value!r}"
        for key, value in content.items()
        if key not in UNDERSTOOD | WITHOUT_EFFECT | {"init_lora_weights"} and value and value != default.get(key)
    ]
    if content.get("init_lora_weights", True) not in HARMLESS_STARTS:
        strange.append(f"init_lora_weights={content['init_lora_weights']!r} (it changes the base weights)")
    if strange:
        raise UserError(f"{path}: {listed(strange)} cannot be reproduced here; only plain LoRA can be attached")
    try:
        return LoraConfig(**{key: value for key, value in content.items() if key in UNDERSTOOD})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds no valid LoraConfig: {error}") from None


# --------------- names


def _kind(state: State) -> str:
    if any(".lora_down." in key for key in state):
        return "kohya"
    return "attention-processors" if any(".processor." in key for key in state) else "diffusers"


def _of_diffusers(
    state: State, component: str, convert: Convert, path: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Factors and alphas by module name."""
    magnitudes = [key for key in state if "dora_scale" in key or "lora_magnitude_vector" in key]
    if magnitudes:
        raise UserError(f"{path} is a DoRA ({listed(magnitudes)}); only plain LoRA can be attached")
    _refuse_encoders([key for key in state if key.startswith("lora_te")], path)
    if several := [key for key, value in state.items() if key.endswith(".alpha") and value.numel() != 1]:
        raise UserError(f"{path}: {listed(several)} must be one number, as an alpha is")
    alphas: dict[str, float] = {}
    rest = dict(state)
    if _kind(state) != "kohya":
        alphas = {key: float(rest.pop(key)) for key in state if key.endswith(".alpha")}
    try:
        converted, found = convert(rest)
    except (ValueError, KeyError, IndexError, AttributeError, NotImplementedError, AssertionError) as error:
        raise UserError(f"{path} is in no layout of LoRA that diffusers can convert for this model: {error}") from error
    alphas |= {key: float(value) for key, value in found.items()}
    named, alphas = _own_part(converted, component, path), _own_part(alphas, component, path)
    if not any(".lora_A." in key for key in named):
        named = convert_unet_state_dict_to_peft(named)
    pairs = _pairs(named, path)
    downs = sum(key.endswith(".lora_down.weight") for key in state)
    if len(pairs) < downs:
        raise UserError(f"{path} has factors of {downs} layers, and diffusers' conversion keeps {len(pairs)} of them")
    return pairs, {_module_of_alpha(key): value for key, value in alphas.items()}


def _own_part(state: Mapping[str, Any], component: str, path: Path) -> dict[str, Any]:
    """Names within the denoiser; files without the components' prefixes are the denoiser's alone."""
    if not any(key.startswith(COMPONENTS) for key in state):
        return dict(state)
    _refuse_encoders([key for key in state if key.startswith("text_encoder")], path)
    prefix = f"{component}."
    foreign = [key for key in state if not key.startswith(prefix)]
    if foreign:
        raise _unused(path, foreign, component)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _refuse_encoders(keys: list[str], path: Path) -> None:
    if keys:
        raise UserError(
            f"{path} also changes the text encoder ({listed(keys)}), and adapters act in the denoiser alone; take an "
            "adapter that was trained without the text encoder"
        )


def _module_of_alpha(key: str) -> str:
    (name,) = convert_unet_state_dict_to_peft({key.removesuffix(".alpha"): None})
    return str(name).partition(".lora")[0]


def _pairs(state: State, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    matches = {key: re.fullmatch(r"(.+)\.lora_([AB])\.weight", key) for key in state}
    unused = [key for key, match in matches.items() if match is None]
    modules = dict.fromkeys(match[1] for match in matches.values() if match is not None)
    single = [
        f"{name}.lora_{factor}.weight"
        for name in modules
        for factor in "AB"
        if f"{name}.lora_{factor}.weight" not in state
    ]
    if unused or not modules:
        raise _unused(path, unused, "denoiser")
    if single:
        raise UserError(f"{path} lacks {listed(single)}: a LoRA has two factors for each layer")
    return {name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in modules}


def _unused(path: Path, keys: list[str], component: str) -> UserError:
    return UserError(
        f"{path}: the {component} has no use for {listed(keys) or 'an empty file'}; expected two LoRA factors for each "
        "layer, named as diffusers, peft or kohya's trainer do, and perhaps its alpha"
    )


# --------------- strengths


def _scales(
    pairs: Mapping[str, tuple[Tensor, Tensor]], config: LoraConfig | None, alphas: Mapping[str, float], path: Path
) -> dict[str, float]:
    """What multiplies up @ down in each module: 1 where the file says nothing."""
    nowhere = [name for name in alphas if name not in pairs]
    if nowhere:
        raise UserError(f"{path} has an alpha of {listed(nowhere)}, but no factors there")
    if config is None:
        return {name: alphas.get(name, len(down)) / len(down) for name, (down, _) in pairs.items()}
    scales = {}
    for name, (down, _) in pairs.items():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        if rank != len(down):
            raise UserError(f"{path}: the configuration gives {name} rank {rank}, its factors have rank {len(down)}")
        scales[name] = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return scales
