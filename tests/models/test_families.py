"""SDXL, Stable Diffusion 3 and FLUX: the pictures are diffusers', and the LoRA is what it says, for every family."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.api import Adapter, AdapterConfig, Conditioning, Generation, Randomness, Request, SamplerConfig
from harness.metering import Meter, MeteredModel
from harness.sampling import generate
from models._latent_diffusion import LatentDiffusion
from models.sdxl import StableDiffusionXL
from tests.fakes import CPU
from tests.models.families import FAMILIES, LONG, MAIN, Family, batch


@pytest.fixture
def lend(models: Mapping[str, LatentDiffusion]) -> Iterator[Callable[[str], LatentDiffusion]]:
    """Gives models to tests that change their adapters, which afterwards do nothing."""
    lent: list[LatentDiffusion] = []

    def give(name: str) -> LatentDiffusion:
        lent.append(models[name])
        return lent[-1]

    yield give
    for model in lent:
        model.add_adapter(AdapterConfig(rank=1), Randomness(0))


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
    name: str, directories: Mapping[str, Path], lend: Callable[[str], LatentDiffusion], tmp_path: Path
) -> None:
    """`load_lora_weights`, without further arguments, reproduces our pictures; alpha/rank is 3 here."""
    family, model, config = FAMILIES[name], lend(name), SamplerConfig(steps=4, guidance=3.0)
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
def test_parameters_given_and_strengths(name: str, lend: Callable[[str], LatentDiffusion]) -> None:
    """Given parameters act as if they were set, and strength 0 is the base."""
    model = lend(name)
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
    """Frozen weights are short; latents, the adapter and its gradient are float32, and so is the autoencoder."""
    model = FAMILIES[name].model(str(directories[name]), CPU, torch.bfloat16)
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    model.add_adapter(AdapterConfig(rank=2), Randomness(0))
    x = Randomness(0).normal((2, *model.latent_shape), "x")
    prediction = model.predict(x, 500, model.condition(["cat", "dog"]), guidance=3.0, adapter=Adapter())
    assert prediction.x0.dtype == torch.float32
    pictures = model.decode(prediction.x0)
    assert pictures.dtype == torch.float32
    assert model.encode(pictures).dtype == torch.float32
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
