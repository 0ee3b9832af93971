"""Adapters made elsewhere and checkpointing inside, for SDXL, Stable Diffusion 3 and FLUX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from harness.api import Adapter, AdapterConfig, DenoiserConfig, Generation, Randomness, SamplerConfig, UserError
from harness.sampling import generate
from models._latent_diffusion import LatentDiffusion
from tests.fakes import CPU, requests
from tests.models.families import FAMILIES

State = dict[str, Tensor]
CONFIG = SamplerConfig(steps=2, guidance=3.0)
UNET = "down_blocks.1.attentions.0.transformer_blocks.0"
RANKS = {
    "sdxl": {f"{UNET}.attn1.to_q": 2, f"{UNET}.attn2.to_v": 3, f"{UNET}.attn1.to_out.0": 2},
    "sd3": {
        "transformer_blocks.0.attn.to_q": 2,
        "transformer_blocks.0.attn.add_k_proj": 3,
        "transformer_blocks.0.attn.to_out.0": 2,
        "transformer_blocks.1.ff.net.2": 2,
    },
    "flux dev": {
        **{f"transformer_blocks.0.attn.to_{name}": 2 for name in ("q", "k", "v", "out.0")},
        "single_transformer_blocks.0.proj_out": 3,
    },
}


@pytest.fixture(scope="module")
def references(directories: Mapping[str, Path]) -> Mapping[str, LatentDiffusion]:
    """The same again, for diffusers' own loader to work on."""
    return {name: FAMILIES[name].model(str(directories[name]), CPU) for name in RANKS}


@pytest.fixture(autouse=True)
def fresh_adapters(models: Mapping[str, LatentDiffusion]) -> Iterator[None]:
    """A test leaves models with adapters that do nothing."""
    yield
    for name in RANKS:
        models[name].add_adapter(AdapterConfig(rank=1), Randomness(0))


def component(model: LatentDiffusion) -> str:
    """`unet` or `transformer`."""
    return model.layout.denoiser[0]


def factors(model: LatentDiffusion, ranks: Mapping[str, int]) -> State:
    """Random factors of the modules, as peft names them."""
    state = {}
    for name, rank in ranks.items():
        layer: Any = model.denoiser.get_submodule(name)
        out, inside = getattr(layer, "base_layer", layer).weight.shape
        state[f"{name}.lora_A.weight"] = Randomness(1).normal((rank, inside), "A", name) / inside**0.5
        state[f"{name}.lora_B.weight"] = Randomness(1).normal((out, rank), "B", name)
    return state


def pictures(model: LatentDiffusion, adapter: float = 1.0) -> Tensor:
    """Two pictures."""
    with torch.no_grad():
        return model.decode(generate(model, requests(model, 2), Generation(CONFIG, adapter)))


def plain(state: State, prefix: str) -> State:
    """As diffusers saves it."""
    return {f"{prefix}.{key}": value for key, value in state.items()}


def with_alphas(state: State, prefix: str) -> State:
    """As trainers of FLUX save it: diffusers' names, and an alpha for each layer."""
    names = dict.fromkeys(key.partition(".lora_")[0] for key in state)
    return plain(state, prefix) | {f"{prefix}.{name}.alpha": torch.tensor(5.0) for name in names}


def kohya_of_unet(state: State, prefix: str) -> State:
    """As kohya's trainer names the UNet of SDXL: blocks of the original code, and an alpha for each layer."""
    result = {}
    for key, value in state.items():
        name, _, factor = key.partition(".lora_")
        flat = "lora_unet_" + name.replace("down_blocks.1.attentions.0", "input_blocks.3.1").replace(".", "_")
        result[f"{flat}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = value
        result[f"{flat}.alpha"] = torch.tensor(4.0)
    return result


def kohya_of_flux(state: State, prefix: str) -> State:
    """The same for FLUX: query, key and value are one layer there."""
    named = {
        "lora_unet_double_blocks_0_img_attn_proj": "transformer_blocks.0.attn.to_out.0",
        "lora_unet_single_blocks_0_linear2": "single_transformer_blocks.0.proj_out",
    }
    result = {}
    for flat, name in named.items():
        result[f"{flat}.lora_down.weight"] = state[f"{name}.lora_A.weight"]
        result[f"{flat}.lora_up.weight"] = state[f"{name}.lora_B.weight"]
    ups = [state[f"transformer_blocks.0.attn.to_{part}.lora_B.weight"] for part in "qkv"]
    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    result[f"{fused}.lora_down.weight"] = state["transformer_blocks.0.attn.to_q.lora_A.weight"]
    result[f"{fused}.lora_up.weight"] = torch.cat(ups)
    return result | {f"{flat}.alpha": torch.tensor(4.0) for flat in (*named, fused)}


@pytest.mark.parametrize(
    ("name", "make", "layout"),
    [
        ("sdxl", plain, "diffusers"),
        ("sdxl", kohya_of_unet, "kohya"),
        ("sd3", plain, "diffusers"),
        ("flux dev", plain, "diffusers"),
        ("flux dev", with_alphas, "diffusers"),
        ("flux dev", kohya_of_flux, "kohya"),
    ],
)
def test_pictures_of_a_file_are_those_of_diffusers(
    name: str,
    make: Callable[[State, str], State],
    layout: str,
    directories: Mapping[str, Path],
    models: Mapping[str, LatentDiffusion],
    references: Mapping[str, LatentDiffusion],
    tmp_path: Path,
) -> None:
    """`load_lora_weights` of the same file into another copy of the denoiser gives the same pictures."""
    model, reference = models[name], references[name]
    base = pictures(reference)
    state = make(factors(model, RANKS[name]), component(model))
    save_file(
        {key: value.clone().contiguous() for key, value in state.items()}, tmp_path / "pytorch_lora_weights.safetensors"
    )
    found = model.load_adapter(tmp_path)
    pipeline = FAMILIES[name].pipeline.from_pretrained(directories[name], **{component(model): reference.denoiser})
    pipeline.load_lora_weights(str(tmp_path))
    expected = pictures(reference)
    pipeline.unload_lora_weights()

    assert (found.layout, found.modules) == (layout, len(RANKS[name]))
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(pictures(model), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(pictures(model, 0.0), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RANKS)
def test_a_directory_of_peft(
    name: str, directories: Mapping[str, Path], models: Mapping[str, LatentDiffusion], tmp_path: Path
) -> None:
    """What peft trained on the denoiser and saved gives peft's own pictures."""
    trained = FAMILIES[name].model(str(directories[name]), CPU)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=list(RANKS[name]), init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(trained.denoiser, config)
    adapted.save_pretrained(tmp_path)
    found = models[name].load_adapter(tmp_path)

    assert (found.layout, found.ranks, found.scales) == ("peft", (2,), (2.5,))
    torch.testing.assert_close(pictures(models[name]), pictures(trained), rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert (pictures(models[name]) - pictures(trained)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "make", "extra", "match"),
    [
        # In both namings at once: the conversion drops one of them without a word.
        ("sdxl", kohya_of_unet, "lora_unet_down_blocks_0_resnets_0_time_emb_proj", "has factors of 4 layers.* keeps 1"),
        ("flux dev", kohya_of_flux, "lora_unet_img_in", "no use for x_embedder"),  # left without the prefix
        ("flux dev", kohya_of_flux, "lora_te2_x", "also changes the text encoder"),  # dropped with a warning
        ("flux dev", kohya_of_flux, "lora_unet_double_blocks_0_x", "no layout of LoRA"),
    ],
)
def test_keys_that_conversion_leaves_out(
    name: str,
    make: Callable[[State, str], State],
    extra: str,
    match: str,
    models: Mapping[str, LatentDiffusion],
    tmp_path: Path,
) -> None:
    """What diffusers' conversion does not know, or gives no place, is named."""
    state = make(factors(models[name], RANKS[name]), component(models[name]))
    state[f"{extra}.lora_down.weight"], state[f"{extra}.lora_up.weight"] = torch.ones(1, 16), torch.ones(32, 1)
    save_file({key: value.clone().contiguous() for key, value in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=match):
        models[name].load_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", RANKS)
def test_blocks_are_recomputed_with_the_adapter_of_their_pass(name: str, directories: Mapping[str, Path]) -> None:
    """Two strengths and given parameters in one graph: the gradients of the model that keeps its activations."""

    def gradients(inside: bool) -> list[Tensor]:
        model = FAMILIES[name].model(str(directories[name]), CPU, torch.float64)
        model.add_adapter(AdapterConfig(rank=2, alpha=6.0), Randomness(3))
        if inside:
            model.configure(DenoiserConfig(checkpoint_inside=True))
        for key, p in model.adapter_parameters().items():
            p.data = 0.3 * Randomness(4).normal(p.shape, key, dtype=torch.float64)
        trained = model.adapter_parameters()
        others = {
            key: (0.3 * Randomness(7).normal(p.shape, key, dtype=torch.float64)).requires_grad_()
            for key, p in trained.items()
        }
        x = Randomness(0).normal((2, *model.latent_shape), "x", dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for t, adapter in ((900, Adapter(0.5)), (500, Adapter(parameters=others)), (100, Adapter())):
            condition = model.condition(["cat", "a dog"])
            x = model.predict(x, t, condition, guidance=2.0, adapter=adapter).x0
            total = total + x.square().sum()
        with torch.no_grad():
            model.predict(x, 500, condition, guidance=2.0, adapter=Adapter(2.0))
        return list(torch.autograd.grad(total, [*trained.values(), *others.values()]))

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
