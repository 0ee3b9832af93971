"""What is on disk: missing parts are named, everything is in the fingerprint, what is not supported is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.api import AdapterConfig, Randomness, UserError
from models.stable_diffusion import StableDiffusion
from models.stable_diffusion_3 import StableDiffusion3
from tests.fakes import CPU
from tests.models.families import FAMILIES, MAIN


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev"])
def test_a_directory_without_a_part(name: str, directories: Mapping[str, Path], tmp_path: Path) -> None:
    """The missing part is named, whichever it is; without its weights, or some of them, as well."""
    family = FAMILIES[name]
    directory = shutil.copytree(directories[name], tmp_path / "incomplete")
    layout = family.model.layout
    folders = [layout.denoiser[0], "vae", *layout.text_encoders, *layout.tokenizers, "scheduler"]
    for folder in folders:
        (directory / folder).rename(tmp_path / "away")
        with pytest.raises(UserError, match=f"lacks {folder}\\."):
            family.model(str(directory), CPU)
        (tmp_path / "away").rename(directory / folder)
    file = directory / layout.denoiser[0] / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    key = next(key for key in sorted(weights) if "to_q" in key)
    save_file({k: v for k, v in weights.items() if k != key}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"lack 1 tensors \({key}\)"):
        family.model(str(directory), CPU)


def test_a_text_encoder_without_some_weights(directories: Mapping[str, Path], tmp_path: Path) -> None:
    """Libraries would fill in random numbers; that is refused."""
    directory = shutil.copytree(directories["sd3"], tmp_path / "incomplete")
    file = directory / "text_encoder_3" / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if "SelfAttention.q" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="text_encoder_3 lack 1 tensors"):
        StableDiffusion3(str(directory), CPU)


def test_the_index_says_whether_there_is_a_t5(directories: Mapping[str, Path], tmp_path: Path) -> None:
    """Left out in model_index.json, its folders are not read; half of it left out is a mistake."""
    directory = shutil.copytree(directories["sd3"], tmp_path / "without")
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    with pytest.raises(UserError, match="one of text_encoder_3 and tokenizer_3"):
        StableDiffusion3(str(directory), CPU)
    (directory / "model_index.json").write_text(
        json.dumps({**index, "text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    )
    model = StableDiffusion3(str(directory), CPU)
    assert "text_encoder_3" not in model.text_encoders
    rows = model.condition(["cat"]).tensors["encoder_hidden_states"]
    assert rows.shape == (1, 16 + 256, 48)
    assert not rows[:, 16:].any()
    shutil.rmtree(directory / "text_encoder_3")
    (directory / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks text_encoder_3.*go without text_encoder_3, give \[null, null\]"):
        StableDiffusion3(str(directory), CPU)


@pytest.mark.parametrize("name", MAIN)
def test_fingerprint_covers_every_part(name: str, directories: Mapping[str, Path]) -> None:
    """A single weight of any part, the scheduler and the scale of latents change it; an adapter does not."""
    model = FAMILIES[name].model(str(directories[name]), CPU)
    before = model.fingerprint()
    for part in (model.denoiser, model.vae, *model.text_encoders.values()):
        weight = next(part.parameters())
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
            assert model.fingerprint() != before
            weight.view(-1)[0] -= 1e-3
    model.add_adapter(AdapterConfig(), Randomness(0))
    assert model.fingerprint() == FAMILIES[name].model(str(directories[name]), CPU).fingerprint()


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": False}),
        ("sdxl", "scheduler/scheduler_config.json", {"beta_end": 0.013}),
        ("sd3", "scheduler/scheduler_config.json", {"shift": 2.0}),
        ("sd3", "vae/config.json", {"shift_factor": 0.2}),
        ("flux dev", "scheduler/scheduler_config.json", {"max_shift": 1.2}),
    ],
)
def test_fingerprint_covers_settings(
    name: str, file: str, change: dict[str, Any], directories: Mapping[str, Path], tmp_path: Path
) -> None:
    """What is in no weight and changes pictures is part of it; where the directory lies is not."""
    directory = shutil.copytree(directories[name], tmp_path / "changed")
    model = FAMILIES[name].model
    before = model(str(directories[name]), CPU).fingerprint()
    assert model(str(directory), CPU).fingerprint() == before
    settings = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**settings, **change}))
    assert model(str(directory), CPU).fingerprint() != before


def test_distilled_unets_are_refused(pipeline_directory: Path, tmp_path: Path) -> None:
    """A UNet that wants its guidance scale as an input would silently run without it."""
    directory = shutil.copytree(pipeline_directory, tmp_path / "consistency")
    pipeline_unet = StableDiffusion(str(directory), CPU).denoiser
    shutil.rmtree(directory / "unet")
    type(pipeline_unet).from_config({**pipeline_unet.config, "time_cond_proj_dim": 8}).save_pretrained(
        directory / "unet"
    )
    with pytest.raises(UserError, match="time_cond_proj_dim"):
        StableDiffusion(str(directory), CPU)


def test_parts_outside_what_is_supported_are_refused(directories: Mapping[str, Path], tmp_path: Path) -> None:
    """Latents that are normalised by mean and deviation, and inverted noise levels."""
    for name, file, change in (
        ("sdxl", "vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}),
        ("sd3", "scheduler/scheduler_config.json", {"invert_sigmas": True}),
    ):
        directory = shutil.copytree(directories[name], tmp_path / name)
        settings = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=f"{next(iter(change))}.*not supported"):
            FAMILIES[name].model(str(directory), CPU)
