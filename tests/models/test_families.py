"""SDXL, Stable Diffusion 3 and FLUX: the pictures are diffusers', and the LoRA is what it says, for every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.api import (
    Adapter,
    AdapterConfig,
    Conditioning,
    Generation,
    Prompt,
    Randomness,
    Request,
    SamplerConfig,
    UserError,
)
from harness.metering import Meter, MeteredModel
from harness.sampling import generate
from models._latent_diffusion import LatentDiffusion
from models.flux import Flux
from models.sdxl import StableDiffusionXL
from models.stable_diffusion import StableDiffusion
from models.stable_diffusion_3 import StableDiffusion3
from tests.fakes import CPU
from tests.models.tiny_pipelines import save_flux, save_sd3, save_sdxl

LONG = "a dog and a cat sit in a very small house by the sea"  # more letters than the tiny CLIPs have places


@dataclass(frozen=True)
class Family:
    """How a pipeline is stored, read here and read by diffusers, and what its call needs beside the usual."""

    save: Callable[[Path], Path]
    model: type[LatentDiffusion]
    pipeline: type[Any]
    components: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    two_scales: bool = False


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
SIZE = {"height": 16, "width": 16}
FAMILIES = {
    "sdxl": Family(save_sdxl, StableDiffusionXL, StableDiffusionXLPipeline),
    "sdxl encoding the empty prompt": Family(
        lambda path: save_sdxl(path, force_zeros_for_empty_prompt=False), StableDiffusionXL, StableDiffusionXLPipeline
    ),
    "sd3": Family(save_sd3, StableDiffusion3, StableDiffusion3Pipeline),
    "sd3.5 without T5": Family(
        lambda path: save_sd3(path, with_t5=False, dual=True), StableDiffusion3, StableDiffusion3Pipeline, NO_T5
    ),
    "sd3 dynamic": Family(
        lambda path: save_sd3(path, use_dynamic_shifting=True), StableDiffusion3, StableDiffusion3Pipeline
    ),
    "flux dev": Family(lambda path: save_flux(path, guidance_embeds=True), Flux, FluxPipeline, call=SIZE),
    # Pipelines call classifier-free guidance of FLUX "true", and take it where there is a negative prompt.
    "flux schnell": Family(
        lambda path: save_flux(path, guidance_embeds=False),
        Flux,
        FluxPipeline,
        call={**SIZE, "negative_prompt": [""] * 3},
        two_scales=True,
    ),
}
MAIN = ["sdxl", "sd3", "flux dev"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every family's directory, stored when first asked for. Read them, do not change them."""

    class Stored(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = FAMILIES[name].save(tmp_path_factory.mktemp("pipelines") / name.replace(" ", "-"))
            return self[name]

    return Stored()


@pytest.fixture(scope="module")
def models(directories: Mapping[str, Path]) -> Mapping[str, LatentDiffusion]:
    """Every family's model in float32, loaded when first asked for."""

    class Loaded(dict[str, LatentDiffusion]):
        def __missing__(self, name: str) -> LatentDiffusion:
            self[name] = FAMILIES[name].model(str(directories[name]), CPU)
            return self[name]

    return Loaded()


@pytest.fixture(autouse=True)
def fresh_adapters(models: Mapping[str, LatentDiffusion]) -> Iterator[None]:
    """A test leaves models with adapters that do nothing."""
    yield
    for model in models.values():
        model.add_adapter(AdapterConfig(rank=1), Randomness(0))


def batch(model: LatentDiffusion) -> list[Request]:
    """Three prompts, one too long."""
    noise = Randomness(5)
    texts = ["cat", "a dog", LONG]
    return [Request(Prompt(t, t), i, noise.normal(model.latent_shape, i)) for i, t in enumerate(texts)]


def ours(model: LatentDiffusion, requests: list[Request], config: SamplerConfig) -> Tensor:
    """Pictures by the harness's sampler."""
    with torch.no_grad():
        return model.decode(generate(model, requests, Generation(config))).clamp(0, 1)


def theirs(family: Family, pipeline: Any, requests: list[Request], config: SamplerConfig) -> Tensor:
    """Pictures by the pipeline's own call, from the same latents."""
    latents = torch.stack([r.noise for r in requests])
    if family.pipeline is FluxPipeline:
        latents = pipeline._pack_latents(latents, *latents.shape)
    scale = {"true_cfg_scale" if family.two_scales else "guidance_scale": config.guidance}
    pictures: Tensor = pipeline(
        prompt=[r.prompt.text for r in requests],
        latents=latents,
        num_inference_steps=config.steps,
        output_type="pt",
        **scale,
        **family.call,
    ).images
    return pictures


def read(family: Family, directory: Path, **options: Any) -> Any:
    """The pipeline; of SDXL with the scheduler whose steps are ours."""
    pipeline = family.pipeline.from_pretrained(directory, **family.components, **options)
    if family.pipeline is StableDiffusionXLPipeline:
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_those_of_diffusers(
    name: str, directories: Mapping[str, Path], models: Mapping[str, LatentDiffusion]
) -> None:
    """The same latents and prompts give diffusers' pictures, with guidance and without."""
    family, model = FAMILIES[name], models[name]
    pipeline = read(family, directories[name])
    requests = batch(model)
    seen = []
    for guidance in (3.0, 1.0):
        config = SamplerConfig(steps=4, guidance=guidance)
        mine, expected = ours(model, requests, config), theirs(family, pipeline, requests, config)
        assert expected.std() > 0.05
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
        seen.append(mine)
    # The comparison would miss nothing that matters: prompts and guidance change these pictures.
    swapped = [Request(other.prompt, r.noise_id, r.noise) for r, other in zip(requests, requests[::-1], strict=True)]
    moved = (ours(model, swapped, config) - seen[-1]).abs().amax((1, 2, 3))
    assert min(moved[0], moved[2]) > 1e-3
    assert (seen[0] - seen[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sdxl", "sd3.5 without T5", "flux dev"])
def test_saved_adapter_gives_the_same_pictures_in_diffusers(
    name: str, directories: Mapping[str, Path], models: Mapping[str, LatentDiffusion], tmp_path: Path
) -> None:
    """`load_lora_weights`, without further arguments, reproduces our pictures; alpha/rank is 3 here."""
    family, model, config = FAMILIES[name], models[name], SamplerConfig(steps=4, guidance=3.0)
    requests = batch(model)
    plain = ours(model, requests, config)
    model.add_adapter(AdapterConfig(rank=2, alpha=6.0), Randomness(3))
    names = model.adapter_parameters()
    with torch.no_grad():
        for key, parameter in names.items():
            parameter.copy_(0.1 * Randomness(4).normal(parameter.shape, key))
    assert all(any(f".{target}." in key for key in names) for target in ("to_q", "to_k", "to_v", "to_out.0"))
    adapted = ours(model, requests, config)
    assert (adapted - plain).abs().max() > 1e-3
    model.save_adapter(tmp_path)
    pipeline = read(family, directories[name])
    pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(theirs(family, pipeline, requests, config), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MAIN)
def test_parameters_given_and_strengths(name: str, models: Mapping[str, LatentDiffusion]) -> None:
    """Given parameters act as if they were set, and strength 0 is the base."""
    model = models[name]
    x, t = Randomness(0).normal((2, *model.latent_shape), "x"), 500
    condition = model.condition(["cat", "a dog"])

    def output(adapter: Adapter) -> Tensor:
        with torch.no_grad():
            return model.predict(x, t, condition, guidance=1.0, adapter=adapter).conditional

    model.add_adapter(AdapterConfig(), Randomness(0))
    base = output(Adapter())
    others = {key: Randomness(8).normal(p.shape, key) for key, p in model.adapter_parameters().items()}
    given = output(Adapter(parameters=others))
    with torch.no_grad():
        for key, parameter in model.adapter_parameters().items():
            parameter.copy_(others[key])
    assert torch.equal(output(Adapter()), given)
    assert not torch.allclose(given, base, atol=1e-3)
    torch.testing.assert_close(output(Adapter(scale=0.0)), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAIN)
def test_bfloat16_denoiser_with_float32_adapter(name: str, directories: Mapping[str, Path]) -> None:
    """Latents and frozen weights are short, the adapter and its gradient are float32, and so is the autoencoder."""
    model = FAMILIES[name].model(str(directories[name]), CPU, torch.bfloat16)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    model.add_adapter(AdapterConfig(rank=2), Randomness(0))
    x = Randomness(0).normal((2, *model.latent_shape), "x").bfloat16()
    prediction = model.predict(x, 500, model.condition(["cat", "dog"]), guidance=3.0, adapter=Adapter())
    assert prediction.x0.dtype == torch.bfloat16
    pictures = model.decode(prediction.x0)
    assert pictures.dtype == torch.float32
    assert model.encode(pictures).dtype == torch.bfloat16
    pictures.square().mean().backward()
    for key, parameter in model.adapter_parameters().items():
        assert parameter.dtype == torch.float32
        if ".lora_B." in key:
            assert parameter.grad is not None, key
            assert parameter.grad.dtype == torch.float32
    assert any(p.grad.abs().sum() > 0 for p in model.adapter_parameters().values() if p.grad is not None)


@pytest.mark.parametrize(
    ("dtype", "encoders"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str
)
def test_an_autoencoder_that_half_precision_overflows(
    dtype: torch.dtype, encoders: torch.dtype, directories: Mapping[str, Path], tmp_path: Path
) -> None:
    """Activations beyond float16's range on the way give finite pictures; text encoders avoid float16 as well."""
    directory = shutil.copytree(directories["sdxl"], tmp_path / "overflow")
    file = directory / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.weight"] *= 1e6  # a normalisation follows at once
    save_file(weights, file, metadata={"format": "pt"})
    model = StableDiffusionXL(str(directory), CPU, dtype)
    assert {p.dtype for encoder in model.text_encoders.values() for p in encoder.parameters()} == {encoders}
    assert model.condition(["cat"]).tensors["encoder_hidden_states"].dtype == dtype
    latents = Randomness(1).normal((1, *model.latent_shape), "latents").to(dtype)
    with torch.no_grad():
        pictures = model.decode(latents)
        assert pictures.isfinite().all()
        exact = StableDiffusionXL(str(directory), CPU, torch.float64).decode(latents.double())
        torch.testing.assert_close(pictures.double(), exact, rtol=0, atol=1e-4)
        assert not model.vae.half().decode(latents.half() / 0.8).sample.isfinite().all()


@pytest.mark.parametrize("name", MAIN)
def test_double_precision_stays(
    name: str, directories: Mapping[str, Path], models: Mapping[str, LatentDiffusion]
) -> None:
    """Every part and the pictures are double, and equal to those of float32 within its rounding."""
    model = FAMILIES[name].model(str(directories[name]), CPU, torch.float64)
    requests, config = batch(model), SamplerConfig(steps=2, guidance=3.0)
    pictures = ours(model, requests, config)
    assert pictures.dtype == torch.float64
    torch.testing.assert_close(pictures, ours(models[name], requests, config).double(), rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("name", ["sd3", "flux dev"])
def test_encoder_and_decoder_share_scale_and_shift(name: str, models: Mapping[str, LatentDiffusion]) -> None:
    """Latents are (mean - shift) * scale, as diffusers' pipelines expect them."""
    model = models[name]
    pictures = Randomness(0).normal((2, 3, 16, 16), "pictures") * 0.1 + 0.5
    with torch.no_grad():
        mean = model.vae.encode(pictures * 2 - 1).latent_dist.mean
        torch.testing.assert_close(model.encode(pictures), (mean - 0.1) * 0.8)
        decoded = model.vae.decode(mean).sample / 2 + 0.5
        torch.testing.assert_close(model.decode((mean - 0.1) * 0.8), decoded)


@pytest.mark.parametrize("name", [*MAIN, "sd3.5 without T5"])
def test_conditions_do_not_depend_on_their_company(name: str, models: Mapping[str, LatentDiffusion]) -> None:
    """A text is encoded the same alone, in a batch and again, whatever its length."""
    model = models[name]
    together, alone = model.condition(["cat", "", LONG, "cat"]), model.condition([LONG])
    for key, rows in together.tensors.items():
        assert torch.equal(rows[0], rows[3])
        assert torch.equal(rows[2], alone.tensors[key][0])
        assert not torch.equal(rows[0], rows[1])


def test_the_empty_prompt_of_sdxl(models: Mapping[str, LatentDiffusion]) -> None:
    """It is zero, both tensors, where the pipeline says so, and encoded where it does not."""
    zero = models["sdxl"].condition(["", "cat"])
    encoded = models["sdxl encoding the empty prompt"].condition(["", "cat"])
    for key in ("encoder_hidden_states", "text_embeds"):
        assert not zero.tensors[key][0].any()
        assert encoded.tensors[key][0].any()
        assert torch.equal(zero.tensors[key][1], encoded.tensors[key][1])


def test_embedded_guidance_takes_one_row(models: Mapping[str, LatentDiffusion]) -> None:
    """A distilled denoiser is told the scale in the pass itself; others take two rows, none with guidance 1."""
    for name, rows in (("flux dev", 1), ("flux schnell", 2), ("sd3", 2), ("sdxl", 2)):
        meter = Meter()
        model = MeteredModel(models[name], meter)
        assert [model.rows_per_latent(g) for g in (0.0, 1.0, 3.5)] == [rows, 1, rows]
        x = Randomness(0).normal((2, *model.latent_shape), "x")
        with torch.no_grad():
            prediction = model.predict(x, 700, model.condition(["a", "b"]), guidance=3.5, adapter=Adapter())
        assert meter.cost.forward_rows == 2 * rows
        assert torch.equal(prediction.conditional, prediction.unconditional) == (rows == 1)


def test_a_condition_of_two_prompts_is_told_its_scale(models: Mapping[str, LatentDiffusion]) -> None:
    """The tensor that `predict` adds is the scale of each row."""
    model = models["flux dev"]
    x = Randomness(0).normal((2, *model.latent_shape), "x")
    condition = model.condition(["a", "b"])
    with torch.no_grad():
        told = Conditioning({**condition.tensors, "guidance": torch.tensor([2.0, 2.0])})
        expected = model.denoise(x, 700, told, Adapter())
        found = model.predict(x, 700, condition, guidance=2.0, adapter=Adapter())
        other = model.predict(x, 700, condition, guidance=4.0, adapter=Adapter())
    assert torch.equal(found.conditional, expected)
    assert (other.conditional - expected).abs().max() > 1e-4


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
