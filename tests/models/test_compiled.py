"""A compiled denoiser: the same numbers, whatever the adapter's strength, and a few compilations in all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters

from harness.api import Adapter, Randomness
from models._lora import Lora
from tests.fakes import CPU

CONTEXT = Randomness(0).normal((2, 3, 4), "context", dtype=torch.float64)


def built() -> tuple[UNet2DConditionModel, Lora]:
    """One attention block with LoRA, in double precision; the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DConditionModel(
            sample_size=4,
            block_out_channels=(4,),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            cross_attention_dim=4,
            attention_head_dim=2,
        )
    network.double().eval().requires_grad_(False)
    lora = Lora(network)
    lora.fresh(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"]), 0, CPU)
    for name, parameter in lora.parameters().items():
        parameter.data = Randomness(1).normal(parameter.shape, name, dtype=torch.float64)
    return network, lora


def output(lora: Lora, t: int, adapter: Adapter) -> Tensor:
    """Of two rows."""
    x = Randomness(0).normal((2, 4, 4, 4), "x", dtype=torch.float64)
    inputs = {"sample": x, "timestep": t, "encoder_hidden_states": CONTEXT, "return_dict": False}
    result: Tensor = lora.run(adapter, inputs)[0]
    return result


def gradients(lora: Lora) -> list[Tensor]:
    """Of a graph through three passes with different strengths."""
    total = sum((output(lora, t, Adapter(scale)) ** 2).sum() for t, scale in ((900, 1.0), (500, 0.5), (100, 0.0)))
    return list(torch.autograd.grad(total, list(lora.parameters().values())))


@pytest.fixture
def ahead_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward graphs are made as for the default backend, which a test has no time for, and run as is."""
    default = nn.Module.compile

    def compiled(self: nn.Module, **options: Any) -> None:
        default(self, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compiled)


def test_strengths_and_timesteps_are_inputs(ahead_of_time: None) -> None:
    """Outputs and gradients are the eager ones for every strength; one graph without gradient, one with."""
    (_, eager), (_, lora) = built(), built()
    lora.compile()
    torch._dynamo.reset()
    counters.clear()
    passes = [(900, 1.0), (500, 0.5), (499, 0.25), (3, 0.0), (900, 2.0), (7, 1.0)]
    with torch.no_grad():
        outputs = [(output(lora, t, Adapter(s)), output(eager, t, Adapter(s))) for t, s in passes]
    found, expected = gradients(lora), gradients(eager)

    for ours, theirs in [*outputs, *zip(found, expected, strict=True)]:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (outputs[0][0] - outputs[4][0]).abs().max() > 1e-3  # strengths 1 and 2 at the same timestep
    assert counters["stats"]["unique_graphs"] == 2
