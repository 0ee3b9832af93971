"""Adapters made elsewhere: every layout gives the pictures of diffusers, of peft, and of weights merged by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.api import Adapter, AdapterConfig, Generation, Randomness, SamplerConfig, UserError
from harness.sampling import generate
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import CPU, requests

CONFIG = SamplerConfig(steps=2, guidance=3.0)  # diffusers steps evenly where the steps divide 1000
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
# Ranks by module: linear layers, 3x3 and 1x1 convolutions.
RANKS = {
    **{f"{ATTENTION}.attn1.{name}": 2 for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"{ATTENTION}.attn2.{name}": 3 for name in ("to_q", "to_out.0")},
    "down_blocks.0.resnets.0.conv1": 2,
    "down_blocks.0.attentions.0.proj_in": 1,
    "mid_block.resnets.1.time_emb_proj": 2,
}
LINEAR = {name: rank for name, rank in RANKS.items() if "attn" in name}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(pipeline_directory: Path) -> StableDiffusion:
    """The tiny pipeline in float32; its adapter is replaced by each test."""
    return StableDiffusion(str(pipeline_directory), CPU)


def pipeline_of(directory: Path) -> StableDiffusionPipeline:
    """Diffusers' own, with the scheduler of `CONFIG`."""
    pipeline = StableDiffusionPipeline.from_pretrained(directory)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(model: StableDiffusion, pipeline: StableDiffusionPipeline) -> Tensor:
    """Diffusers' pictures of two prompts."""
    batch = requests(model, 2)
    pictures: Tensor = pipeline(
        prompt=[r.prompt.text for r in batch],
        latents=torch.stack([r.noise for r in batch]),
        num_inference_steps=CONFIG.steps,
        guidance_scale=CONFIG.guidance,
        output_type="pt",
    ).images
    return pictures


def ours(model: StableDiffusion, lora_scale: float = 1.0) -> Tensor:
    """Our pictures of the same prompts."""
    with torch.no_grad():
        return model.decode(generate(model, requests(model, 2), Generation(CONFIG, lora_scale))).clamp(0, 1)


def factors(model: StableDiffusion, ranks: Mapping[str, int] = RANKS) -> State:
    """Random factors of the modules, as peft names them."""
    state = {}
    for name, rank in ranks.items():
        layer = model.denoiser.get_submodule(name)
        out, *inside = getattr(layer, "base_layer", layer).weight.shape
        ones = [1] * (len(inside) - 1)
        state[f"{name}.lora_A.weight"] = Randomness(1).normal((rank, *inside), "A", name) / inside[0] ** 0.5
        state[f"{name}.lora_B.weight"] = Randomness(1).normal((out, rank, *ones), "B", name)
    return state


def merged(directory: Path, state: State, scales: Mapping[str, float]) -> StableDiffusionPipeline:
    """The pipeline with scale * B A added to its weights, without any LoRA library."""
    pipeline = pipeline_of(directory)
    for name, scale in scales.items():
        up, down = state[f"{name}.lora_B.weight"], state[f"{name}.lora_A.weight"]
        weight = pipeline.unet.get_submodule(name).weight
        with torch.no_grad():
            weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return pipeline


def plain(state: State) -> State:
    """As diffusers saves it."""
    return {f"unet.{key}": value for key, value in state.items()}


def processors(state: State) -> State:
    """As attention processors saved themselves: `attn1.processor.to_out_lora.up.weight`."""
    return {
        key.replace(".to_out.0.", ".to_out.")
        .replace(".to_", ".processor.to_")
        .replace(".lora_A.", "_lora.down.")
        .replace(".lora_B.", "_lora.up."): value
        for key, value in state.items()
    }


def kohya(state: State, alphas: Mapping[str, float]) -> State:
    """As kohya's trainer saves it: underscores, and an alpha for each module."""
    result = {}
    for key, value in state.items():
        name, _, factor = key.partition(".lora_")
        flat = f"lora_unet_{name.replace('.', '_')}"
        result[f"{flat}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = value
        if name in alphas:
            result[f"{flat}.alpha"] = torch.tensor(alphas[name])
    return result


def assert_same(pictures: Tensor, expected: Tensor, base: Tensor) -> None:
    """Equal to 1e-5, and far from what the base model makes."""
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
    assert (pictures - base).abs().max() > 1e-2


@pytest.fixture(scope="module")
def base(model: StableDiffusion) -> Tensor:
    """Pictures without an adapter."""
    return ours(model, lora_scale=0.0)


METADATA = LoraConfig(
    r=2,
    lora_alpha=6,
    rank_pattern={"attn2.to_q": 3, "attn2.to_out.0": 3, "proj_in": 1},
    alpha_pattern={"attn1.to_k": 1, "conv1": 5},
    target_modules=list(RANKS),
    init_lora_weights="gaussian",
)


def metadata_scales(root: bool = False) -> dict[str, float]:
    """Scales of `METADATA`, by hand."""
    alphas = {name: 1 if name.endswith("attn1.to_k") else 5 if name.endswith("conv1") else 6 for name in RANKS}
    return {name: alpha / (RANKS[name] ** 0.5 if root else RANKS[name]) for name, alpha in alphas.items()}


@pytest.mark.parametrize(
    ("make", "scales", "layout"),
    [
        pytest.param(plain, dict.fromkeys(RANKS, 1.0), "diffusers", id="diffusers"),
        pytest.param(
            lambda state: kohya(state, dict.fromkeys(RANKS, 4.0)),
            {name: 4.0 / rank for name, rank in RANKS.items()},
            "kohya",
            id="kohya",
        ),
        pytest.param(lambda state: kohya(state, {}), dict.fromkeys(RANKS, 1.0), "kohya", id="kohya-without-alpha"),
        pytest.param(
            lambda state: plain(processors({key: v for key, v in state.items() if "attn" in key})),
            dict.fromkeys(LINEAR, 1.0),
            "attention-processors",
            id="attention-processors",
        ),
    ],
)
def test_pictures_of_a_file_are_those_of_diffusers(
    model: StableDiffusion,
    base: Tensor,
    pipeline_directory: Path,
    tmp_path: Path,
    make: Callable[[State], State],
    scales: dict[str, float],
    layout: str,
) -> None:
    """`load_lora_weights` of the same file, and merged weights; half the strength is half the update."""
    state = factors(model)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(make(state), file)
    found = model.load_adapter(file)
    pipeline = pipeline_of(pipeline_directory)
    pipeline.load_lora_weights(str(tmp_path))

    assert (found.layout, found.modules) == (layout, len(scales))
    assert found.scales == tuple(sorted(set(scales.values())))
    assert_same(ours(model), theirs(model, pipeline), base)
    assert_same(ours(model), theirs(model, merged(pipeline_directory, state, scales)), base)
    halved = {name: scale / 2 for name, scale in scales.items()}
    assert_same(ours(model, 0.5), theirs(model, merged(pipeline_directory, state, halved)), base)
    assert torch.allclose(ours(model, 0.0), base, atol=1e-6)


@pytest.mark.parametrize("root", [False, True])
def test_alphas_of_the_metadata(
    model: StableDiffusion, base: Tensor, pipeline_directory: Path, tmp_path: Path, root: bool
) -> None:
    """The configuration in the header decides each layer's scale: patterns, and alpha over the root of the rank."""
    state = factors(model)
    config = {**METADATA.to_dict(), "use_rslora": root}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config)
    found = model.load_adapter(tmp_path)
    pipeline = pipeline_of(pipeline_directory)
    pipeline.load_lora_weights(str(tmp_path))

    assert (found.layout, found.ranks) == ("diffusers", (1, 2, 3))
    assert_same(ours(model), theirs(model, pipeline), base)
    assert_same(ours(model), theirs(model, merged(pipeline_directory, state, metadata_scales(root))), base)


@pytest.mark.parametrize("root", [False, True])
def test_a_directory_of_peft(
    model: StableDiffusion, base: Tensor, pipeline_directory: Path, tmp_path: Path, root: bool
) -> None:
    """What `PeftModel.save_pretrained` wrote: its patterns decide; `PeftModel.from_pretrained` gives the same."""
    state = factors(model)
    pipeline = pipeline_of(pipeline_directory)
    config = LoraConfig(**{**METADATA.to_dict(), "use_rslora": root})
    trained = get_peft_model(pipeline.unet, config)
    names = {key.replace(".weight", ".default.weight"): value for key, value in state.items()}
    trained.get_base_model().load_state_dict(names, strict=False)
    trained.save_pretrained(tmp_path)
    found = model.load_adapter(tmp_path)
    again = pipeline_of(pipeline_directory)
    again.unet = PeftModel.from_pretrained(again.unet, tmp_path).get_base_model()

    assert (found.layout, found.modules, found.ranks) == ("peft", len(RANKS), (1, 2, 3))
    assert model.load_adapter(tmp_path / "adapter_model.safetensors") == found
    assert_same(ours(model), theirs(model, again), base)
    assert_same(ours(model), theirs(model, merged(pipeline_directory, state, metadata_scales(root))), base)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "mine.safetensors"])
def test_processors_without_the_name_of_the_unet(
    model: StableDiffusion, base: Tensor, pipeline_directory: Path, tmp_path: Path, name: str
) -> None:
    """Files of `unet.save_attn_procs` know the UNet alone; `load_lora_weights` needs the prefix that they lack."""
    state = factors(model, LINEAR)
    old = processors(state)
    torch.save(old, tmp_path / name) if name.endswith(".bin") else save_file(old, tmp_path / name)
    found = model.load_adapter(tmp_path)
    pipeline = pipeline_of(pipeline_directory)
    pipeline.load_lora_weights(plain(old))

    assert (found.layout, found.modules) == ("attention-processors", len(LINEAR))
    assert_same(ours(model), theirs(model, pipeline), base)
    expected = merged(pipeline_directory, state, dict.fromkeys(LINEAR, 1.0))
    assert_same(ours(model), theirs(model, expected), base)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_each_layer_has_its_own_alpha(
    model: StableDiffusion, base: Tensor, pipeline_directory: Path, tmp_path: Path, layout: str
) -> None:
    """Alphas that differ: scale * B A of each layer, merged by hand."""
    state = factors(model)
    alphas = {name: 1.0 + i for i, name in enumerate(RANKS)}
    named = {f"unet.{name}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}
    save_file(kohya(state, alphas) if layout == "kohya" else plain(state) | named, tmp_path / "mine.safetensors")
    model.load_adapter(tmp_path / "mine.safetensors")
    scales = {name: alpha / RANKS[name] for name, alpha in alphas.items()}

    assert_same(ours(model), theirs(model, merged(pipeline_directory, state, scales)), base)


def test_our_own_adapter(model: StableDiffusion, base: Tensor, tmp_path: Path) -> None:
    """What was saved is read, beside the parameters that a cell's directory holds, too."""
    model.add_adapter(AdapterConfig(rank=2, alpha=6.0), Randomness(3))
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            parameter.copy_(0.3 * Randomness(4).normal(parameter.shape, name))
    expected = ours(model)
    model.save_adapter(tmp_path)
    save_file({name: p.detach() for name, p in model.adapter_parameters().items()}, tmp_path / "parameters.safetensors")
    model.add_adapter(AdapterConfig(), Randomness(0))
    found = model.load_adapter(tmp_path)

    assert (found.layout, found.ranks, found.scales) == ("diffusers", (2,), (1.0,))
    assert_same(ours(model), expected, base)


def test_what_was_loaded_trains_and_is_saved(
    model: StableDiffusion, base: Tensor, pipeline_directory: Path, tmp_path: Path
) -> None:
    """Float32 parameters, the only ones with a gradient; given values act; ranks and scales survive saving."""
    state = factors(model)
    save_file(
        {key: value.half() for key, value in kohya(state, dict.fromkeys(RANKS, 5.0)).items()},
        tmp_path / "a.safetensors",
    )
    model.load_adapter(tmp_path / "a.safetensors")
    parameters = model.adapter_parameters()
    rounded = {key: value.half().float() for key, value in state.items()}

    assert {name.replace(".default", ""): p.shape for name, p in parameters.items()} == {
        key: value.shape for key, value in state.items()
    }
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {name for name, p in model.denoiser.named_parameters() if p.requires_grad} == parameters.keys()
    scales = {name: 5.0 / rank for name, rank in RANKS.items()}
    expected = theirs(model, merged(pipeline_directory, rounded, scales))
    assert_same(ours(model), expected, base)

    model.save_adapter(tmp_path / "again")
    pipeline = pipeline_of(pipeline_directory)
    pipeline.load_lora_weights(str(tmp_path / "again"))
    assert_same(theirs(model, pipeline), expected, base)

    x = Randomness(0).normal((2, *model.latent_shape), "x")
    condition = model.condition(["cat", "dog"])
    doubled = {name: p.detach() * (2 if ".lora_B." in name else 1) for name, p in parameters.items()}
    with torch.no_grad():
        given = model.denoise(x, 500, condition, Adapter(parameters=doubled))
        torch.testing.assert_close(given, model.denoise(x, 500, condition, Adapter(scale=2.0)), rtol=1e-5, atol=1e-5)
    model.denoise(x, 500, condition, Adapter()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())


def test_the_hash_is_that_of_what_was_read(model: StableDiffusion, tmp_path: Path) -> None:
    """The same file gives the same; another alpha in peft's configuration another."""
    get_peft_model(pipeline_of_unet(model), LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path)
    first = model.load_adapter(tmp_path)
    assert model.load_adapter(tmp_path) == first
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}), encoding="utf-8")
    assert model.load_adapter(tmp_path).sha256 != first.sha256


def pipeline_of_unet(model: StableDiffusion) -> Any:
    """A UNet of the model's architecture without an adapter."""
    with torch.random.fork_rng():
        return type(model.denoiser).from_config(model.denoiser.config)


# --------------- refused


def refused(model: StableDiffusion, path: Path, match: str) -> None:
    """With the reason, and the present adapter stays."""
    model.add_adapter(AdapterConfig(rank=2), Randomness(3))
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            parameter.copy_(0.3 * Randomness(4).normal(parameter.shape, name))
    before = ours(model)
    with pytest.raises(UserError, match=match):
        model.load_adapter(path)
    assert torch.equal(ours(model), before)


QUERY = f"{ATTENTION}.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: {**plain(s), "text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(1, 16)}, "text encoder"),
        (lambda s: {**kohya(s, {}), **_encoder_of_kohya()}, "text encoder"),
        (lambda s: {**plain(s), "unet.conv_in.weight": torch.ones(1)}, r"no use for conv_in\.weight"),
        (lambda s: {**plain(s), "vae.lora_A.weight": torch.ones(1)}, r"no use for vae\.lora_A\.weight"),
        (lambda s: {**plain(s), f"unet.{QUERY}.dora_scale": torch.ones(1)}, "is a DoRA"),
        (lambda s: {**kohya(s, {}), "lora_unet_x.hada_w1_a": torch.ones(1)}, "no layout of LoRA"),
        (lambda s: {**kohya(s, {}), "lora_unet_x.alpha": torch.tensor(1.0)}, "no layout of LoRA"),
        (lambda s: {k: v for k, v in plain(s).items() if k != f"unet.{QUERY}.lora_B.weight"}, "lacks .*to_q.lora_B"),
        (lambda s: {**plain(s), f"unet.{QUERY}s.alpha": torch.tensor(1.0)}, "alpha of .*to_qs, but no factors"),
        (lambda s: {**plain(s), f"unet.{QUERY}.alpha": torch.ones(2)}, "must be one number"),
        (lambda s: {k.replace("unet.", "transformer."): v for k, v in plain(s).items()}, "no use for transformer"),
        (lambda s: {k.replace("blocks.0", "blocks.7"): v for k, v in plain(s).items()}, "no such linear"),
        (lambda s: {k: v[..., :5] if ".lora_A" in k else v for k, v in plain(s).items()}, "do not fit"),
        (lambda s: {k: v[:5] if ".lora_B" in k else v for k, v in plain(s).items()}, "do not fit"),
        (lambda s: {k: v[..., None, None] if ".lora_B" in k else v for k, v in plain(s).items()}, "do not fit"),
        (lambda s: {}, "an empty file"),
    ],
)
def test_a_file_that_cannot_be_used_wholly(
    model: StableDiffusion, tmp_path: Path, change: Callable[[State], State], match: str
) -> None:
    """Nothing in it is passed over."""
    save_file(
        {key: value.contiguous() for key, value in change(factors(model, LINEAR)).items()}, tmp_path / "x.safetensors"
    )
    refused(model, tmp_path / "x.safetensors", match)


def _encoder_of_kohya() -> State:
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    return {f"{name}.lora_down.weight": torch.ones(1, 16), f"{name}.lora_up.weight": torch.ones(16, 1)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "use_dora=True cannot be reproduced"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "it changes the base weights"),
        ({"peft_type": "LOHA"}, "'LOHA' adapter"),
        ({"r": 5}, "rank 5, its factors have rank 2"),
        ({"something_new": 3}, "something_new=3"),
    ],
)
def test_a_configuration_of_peft_that_is_no_plain_lora(
    model: StableDiffusion, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    """What would act otherwise is named."""
    get_peft_model(pipeline_of_unet(model), LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    refused(model, tmp_path, match)


class _Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_no_code_of_a_file_is_executed(model: StableDiffusion, tmp_path: Path) -> None:
    """A pickle that would run something is refused, unread."""
    torch.save({"unet.x.lora_A.weight": _Evil(tmp_path / "executed")}, tmp_path / "pytorch_lora_weights.bin")
    refused(model, tmp_path, "would execute code is refused")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.safetensors"])
def test_a_file_that_is_no_checkpoint(model: StableDiffusion, tmp_path: Path, name: str) -> None:
    """Whatever a reader raises, it is said in one line, without advice to execute the file."""
    (tmp_path / name).write_text("these are no weights")
    refused(model, tmp_path / name, "cannot be read as an adapter")


def test_which_file(model: StableDiffusion, tmp_path: Path) -> None:
    """A place that does not exist, a directory with several files, one with none, a configuration alone."""
    refused(model, tmp_path / "nowhere", "does not exist")
    refused(model, tmp_path, "Found no .safetensors")
    state = factors(model, LINEAR)
    for name in ("a", "b"):
        save_file(plain(state), tmp_path / f"{name}.safetensors")
    refused(model, tmp_path, "Found a.safetensors, b.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(model, tmp_path, "neither adapter_model.safetensors nor")
    (tmp_path / "c.safetensors").write_bytes(b"no tensors")
    refused(model, tmp_path / "c.safetensors", "cannot be read as an adapter")


def test_the_closed_form_model_reads_its_own(gaussian: GaussianModel, tmp_path: Path) -> None:
    """What it saved, and nothing else."""
    gaussian.add_adapter(AdapterConfig(), Randomness(0))
    with torch.no_grad():
        gaussian.adapter_parameters()["bias"].fill_(0.5)
    gaussian.save_adapter(tmp_path)
    other = GaussianModel()
    found = other.load_adapter(tmp_path)

    assert (found.layout, found.modules) == ("gaussian", 2)
    assert torch.equal(other.adapter_parameters()["bias"], gaussian.adapter_parameters()["bias"])
    save_file({"bias": load_file(tmp_path / "adapter.safetensors")["bias"]}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="expected bias and gain"):
        other.load_adapter(tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        other.load_adapter(tmp_path / "nowhere")
