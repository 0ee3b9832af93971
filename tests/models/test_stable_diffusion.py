"""The adapter of diffusers' pipelines: the pictures are diffusers', and the LoRA is what it says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from harness.api import Adapter, AdapterConfig, Generation, Randomness, SamplerConfig, UserError
from harness.contracts.tiny import save_tiny_pipeline
from harness.sampling import generate
from models.stable_diffusion import StableDiffusion
from tests.fakes import CPU, requests

X = Randomness(0).normal((2, 4, 8, 8), "x")


@pytest.fixture(scope="module")
def model(pipeline_directory: Path) -> StableDiffusion:
    """The tiny pipeline in float32."""
    return StableDiffusion(str(pipeline_directory), CPU)


@pytest.fixture
def adapted(model: StableDiffusion) -> StableDiffusion:
    """The same with an adapter that changes the output, alpha not equal to rank."""
    add_adapter(model)
    return model


def add_adapter(model: StableDiffusion) -> None:
    """Rank 2, alpha 6, random factors."""
    model.add_adapter(AdapterConfig(rank=2, alpha=6.0), Randomness(3))
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            parameter.copy_(0.3 * Randomness(4).normal(parameter.shape, name))


def output(model: StableDiffusion, adapter: Adapter) -> Tensor:
    """The denoiser's output for two prompts."""
    with torch.no_grad():
        return model.denoise(X, 500, model.condition(["cat", "a dog"]), adapter)


def diffusers_pipeline(directory: Path, config: SamplerConfig) -> StableDiffusionPipeline:
    """The pipeline with diffusers' DDIM scheduler of the same conventions."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config,
        timestep_spacing=config.spacing,
        steps_offset=1,
        set_alpha_to_one=config.final_alpha == "one",
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same_pictures(model: StableDiffusion, pipeline: StableDiffusionPipeline, config: SamplerConfig) -> None:
    """Our sampler on our adapter's interface against diffusers' own loop."""
    batch = requests(model, 3)
    with torch.no_grad():
        ours = model.decode(generate(model, batch, Generation(config))).clamp(0, 1)
    theirs = pipeline(
        prompt=[r.prompt.text for r in batch],
        latents=torch.stack([r.noise for r in batch]),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        eta=0.0,
        output_type="pt",
    ).images
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "conventions",
    [
        {"spacing": "trailing", "final_alpha": "one"},
        {"spacing": "leading", "final_alpha": "one"},
        {"spacing": "leading", "final_alpha": "first"},
    ],
)
def test_pictures_are_those_of_diffusers(
    pipeline_directory: Path, model: StableDiffusion, conventions: dict[str, Any]
) -> None:
    """The same latents and prompts give diffusers' pictures to 1e-5, guidance included."""
    config = SamplerConfig(steps=5, guidance=4.0, **conventions)
    assert_same_pictures(_base(model), diffusers_pipeline(pipeline_directory, config), config)


def test_pictures_of_a_model_that_predicts_velocity(tmp_path: Path) -> None:
    """The parametrisation is read from the scheduler that is stored with the model."""
    directory = save_tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    config = SamplerConfig(steps=5, guidance=4.0)
    model = StableDiffusion(str(directory), CPU)
    assert model.prediction_type == "v_prediction"
    assert_same_pictures(model, diffusers_pipeline(directory, config), config)


def _base(model: StableDiffusion) -> StableDiffusion:
    model.add_adapter(AdapterConfig(), Randomness(0))
    return model


def test_saved_adapter_gives_the_same_pictures_in_diffusers(
    pipeline_directory: Path, adapted: StableDiffusion, tmp_path: Path
) -> None:
    """`load_lora_weights` of diffusers, without further arguments, reproduces our pictures; alpha/rank is 3 here."""
    config = SamplerConfig(steps=5, guidance=4.0)
    adapted.save_adapter(tmp_path / "lora")
    pipeline = diffusers_pipeline(pipeline_directory, config)
    with pytest.raises(AssertionError):
        assert_same_pictures(adapted, pipeline, config)
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    assert_same_pictures(adapted, pipeline, config)


def test_a_fresh_adapter_changes_nothing(model: StableDiffusion) -> None:
    """Its B is zero and its A is not; its parameters are float32 and the only ones that train."""
    model.add_adapter(AdapterConfig(rank=4), Randomness(0))
    assert torch.equal(output(model, Adapter()), output(model, Adapter(scale=0.0)))
    found = model.adapter_parameters()
    assert {name for name, p in model.denoiser.named_parameters() if p.requires_grad} == found.keys()
    for name, parameter in found.items():
        assert parameter.dtype == torch.float32
        assert bool((parameter == 0).all()) == (".lora_B." in name)
    factors = torch.cat([p.flatten() for name, p in found.items() if ".lora_A." in name])
    assert factors.std().item() == pytest.approx(1 / 4, rel=0.1)


def test_initial_adapter_is_keyed_by_its_randomness(model: StableDiffusion) -> None:
    """The same key gives the same factors, another key others."""

    def factors(seed: int) -> Tensor:
        model.add_adapter(AdapterConfig(), Randomness(seed))
        return torch.cat([p.detach().flatten() for p in model.adapter_parameters().values()])

    first = factors(0)
    assert torch.equal(factors(0), first)
    assert not torch.equal(factors(1), first)


def test_strength_scales_the_update(adapted: StableDiffusion) -> None:
    """Scale s acts as s times the trained B: the update is linear in it, and 0 is the base. Calls are independent."""
    full, base = output(adapted, Adapter()), output(adapted, Adapter(scale=0.0))
    half = output(adapted, Adapter(scale=0.5))
    assert torch.equal(output(adapted, Adapter()), full)
    halved = {
        name: p.detach() * (0.5 if ".lora_B." in name else 1.0) for name, p in adapted.adapter_parameters().items()
    }
    torch.testing.assert_close(half, output(adapted, Adapter(parameters=halved)), rtol=1e-5, atol=1e-5)
    layer = adapted.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    probe = Randomness(9).normal((5, layer.in_features), "probe")
    updates = []
    for scale in (0.0, 0.5, 1.0):
        output(adapted, Adapter(scale=scale))  # leaves the layers at this strength
        updates.append((layer(probe) - layer.base_layer(probe)).detach())
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(updates[2], (3.0 * probe @ a.T @ b.T).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(updates[1], updates[2] / 2, rtol=1e-4, atol=1e-5)
    assert not updates[0].any()
    adapted.denoiser.disable_adapters()
    bare = output(adapted, Adapter())
    adapted.denoiser.enable_adapters()
    torch.testing.assert_close(base, bare, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(base, full, atol=1e-3)


def test_given_parameters_act_as_if_they_were_set(adapted: StableDiffusion) -> None:
    """`Adapter(parameters=...)` equals setting them, and leaves the trained ones as they are."""
    trained = {name: p.detach().clone() for name, p in adapted.adapter_parameters().items()}
    others = {name: Randomness(8).normal(p.shape, name) for name, p in trained.items()}
    given = output(adapted, Adapter(parameters=others))
    assert all(torch.equal(p, trained[name]) for name, p in adapted.adapter_parameters().items())
    with torch.no_grad():
        for name, parameter in adapted.adapter_parameters().items():
            parameter.copy_(others[name])
    assert torch.equal(output(adapted, Adapter()), given)


def test_fingerprint_is_that_of_the_base(pipeline_directory: Path, tmp_path: Path) -> None:
    """An adapter does not change it, nor the directory's name; a single weight does."""
    model = StableDiffusion(str(pipeline_directory), CPU)
    before = model.fingerprint()
    add_adapter(model)
    assert model.fingerprint() == before
    copied = shutil.copytree(pipeline_directory, tmp_path / "elsewhere")
    other = StableDiffusion(str(copied), CPU)
    assert other.fingerprint() == before
    for part in (other.denoiser, other.vae, other.text_encoders["text_encoder"]):
        weight = next(part.parameters())
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
            assert other.fingerprint() != before
            weight.view(-1)[0] -= 1e-3


def test_loading_leaves_the_global_generator_alone(pipeline_directory: Path) -> None:
    """Neither loading nor an adapter's random start moves torch's global state."""
    state = torch.get_rng_state()
    model = StableDiffusion(str(pipeline_directory), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    add_adapter(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_conditions_do_not_depend_on_their_company(model: StableDiffusion) -> None:
    """A text is encoded the same alone, in a batch and again; the empty text is a row of its own."""
    rows = model.condition(["cat", "", "a dog", "cat"]).tensors["encoder_hidden_states"]
    assert torch.equal(rows[0], rows[3])
    assert torch.equal(model.condition(["cat"]).tensors["encoder_hidden_states"][0], rows[0])
    assert not torch.equal(rows[0], rows[1])


def test_encoder_and_decoder_share_a_scale(model: StableDiffusion) -> None:
    """Latents of the encoder are scaled as the decoder expects them: what diffusers computes, times the factor."""
    pictures = Randomness(0).normal((2, 3, 16, 16), "pictures") * 0.1 + 0.5
    with torch.no_grad():
        expected = model.vae.encode(pictures * 2 - 1).latent_dist.mean * 0.8
        torch.testing.assert_close(model.encode(pictures), expected)
        decoded = model.vae.decode(expected / 0.8).sample / 2 + 0.5
        torch.testing.assert_close(model.decode(expected), decoded)


def test_pictures_keep_double_precision(tiny_model: StableDiffusion) -> None:
    """Nothing between latents and reward rounds to float32 in a run in double precision."""
    assert tiny_model.decode(torch.zeros(1, 4, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    """The user is told what was looked for, and what would be right."""
    with pytest.raises(UserError, match=r"cannot be loaded.*local directory"):
        StableDiffusion(str(tmp_path / "nowhere"), CPU)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_directory_without_a_part(pipeline_directory: Path, tmp_path: Path, part: str) -> None:
    """The missing part is named."""
    directory = shutil.copytree(pipeline_directory, tmp_path / "incomplete")
    shutil.rmtree(directory / part)
    with pytest.raises(UserError, match=f"lacks {part}"):
        StableDiffusion(str(directory), CPU)


def test_a_directory_without_safetensors(pipeline_directory: Path, tmp_path: Path) -> None:
    """Pickled weights are not read: that can run code. The user is told."""
    directory = shutil.copytree(pipeline_directory, tmp_path / "pickled")
    model = StableDiffusion(str(pipeline_directory), CPU)
    weights = directory / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(model.denoiser.state_dict(), directory / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"no file named diffusion_pytorch_model.safetensors"):
        StableDiffusion(str(directory), CPU)


def test_targets_that_do_not_exist(pipeline_directory: Path) -> None:
    """An adapter on modules that the UNet lacks is the user's mistake."""
    model = StableDiffusion(str(pipeline_directory), CPU)
    with pytest.raises(UserError, match="cannot be attached"):
        model.add_adapter(AdapterConfig(targets=("no_such_module",)), Randomness(0))
