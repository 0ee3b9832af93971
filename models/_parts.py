"""The parts of a latent diffusion model on disk, in the layout of a pipeline of diffusers: which, and how they load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL
from torch import Tensor

from harness.api import UserError

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Layout:
    """The folders of a family's directory, each with the class that reads it; `vae` is an AutoencoderKL in all.

    Attributes:
        pipeline: The family's pipeline in diffusers, which writes adapters.
        denoiser: `unet` or `transformer`, with its class.
        text_encoders: By folder.
        tokenizers: By folder.
        scheduler: Class of the folder `scheduler`.
        optional: Folders of text encoders and tokenizers that `model_index.json` may give as `[null, null]`.
    """

    pipeline: type[Any]
    denoiser: tuple[str, type[Any]]
    text_encoders: Mapping[str, type[Any]]
    tokenizers: Mapping[str, type[Any]]
    scheduler: type[Any]
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Parts:
    """What was loaded: the modules on the CPU, not frozen.

    Attributes:
        settings: The content of `model_index.json`.
        denoiser: In the dtype that was asked for.
        vae: In float32 where that is shorter.
        text_encoders: By folder, without optional ones that are left out; in float32 where the dtype is float16.
        tokenizers: By folder, the same.
        scheduler: With its settings.
    """

    settings: Mapping[str, Any]
    denoiser: Any
    vae: Any
    text_encoders: dict[str, Any]
    tokenizers: dict[str, Any]
    scheduler: Any


def load_parts(source: str, layout: Layout, dtype: torch.dtype, revision: str | None) -> Parts:
    """Read a directory or hub id; only safetensors are read, and no weight may be missing.

    Raises:
        UserError: A part is absent, or cannot be loaded.
    """
    pipeline = layout.pipeline.__name__
    common: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        settings: Mapping[str, Any] = layout.pipeline.load_config(source, **common)
        left_out = {part for part in layout.optional if (settings.get(part) or [None])[0] is None}
        encoders = {part: kind for part, kind in layout.text_encoders.items() if part not in left_out}
        tokenizers = {part: kind for part, kind in layout.tokenizers.items() if part not in left_out}
        _check_folders(source, pipeline, [layout.denoiser[0], "vae", *encoders, *tokenizers, "scheduler"], layout)
        half = dtype in (torch.float16, torch.bfloat16)
        shared = {"use_safetensors": True, **common}
        of_vae = {"torch_dtype": torch.float32 if half else dtype, **shared}
        of_encoders = {_transformers_dtype(): torch.float32 if dtype == torch.float16 else dtype, **shared}
        return Parts(
            settings,
            _complete(layout.denoiser[1], source, layout.denoiser[0], {"torch_dtype": dtype, **shared}),
            _complete(AutoencoderKL, source, "vae", of_vae),
            {part: _complete(kind, source, part, of_encoders) for part, kind in encoders.items()},
            {part: kind.from_pretrained(source, subfolder=part, **common) for part, kind in tokenizers.items()},
            layout.scheduler.from_pretrained(source, subfolder="scheduler", **common),
        )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the model {source!r} cannot be loaded: {first}. Give a local directory written by "
            f"`{pipeline}.save_pretrained` (safetensors), or a hub id that is cached or reachable."
        ) from error


def token_ids(tokenizer: Any, texts: list[str], length: int, device: torch.device) -> Tensor:
    """Token ids (B, length), padded; over-long texts are cut."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: Tensor = tokens.input_ids.to(device)
    return ids


def _check_folders(source: str, pipeline: str, folders: list[str], layout: Layout) -> None:
    absent = [folder for folder in folders if not (Path(source) / folder).is_dir()] if Path(source).is_dir() else []
    if absent:
        spared = [folder for folder in absent if folder in layout.optional]
        without = f" To go without {', '.join(spared)}, give [null, null] in model_index.json." if spared else ""
        raise UserError(
            f"{source} is no {pipeline} directory: it lacks {', '.join(absent)}. "
            f"Expected the folders {', '.join(folders)}, as `pipeline.save_pretrained` writes them.{without}"
        )


def _complete(kind: type[Any], source: str, folder: str, options: Mapping[str, Any]) -> Any:
    """A module all of whose weights were in the file: libraries would draw missing ones at random."""
    module, found = kind.from_pretrained(source, subfolder=folder, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        names = ", ".join(missing[:SHOWN]) + (" ..." if len(missing) > SHOWN else "")
        raise UserError(f"{source}: the weights of {folder} lack {len(missing)} tensors ({names}); get the file again")
    return module


def _transformers_dtype() -> str:
    """What transformers calls the dtype to load in: renamed in 4.56, where the old name began to warn."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"
