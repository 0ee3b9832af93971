"""Operations of units: those of networks whose numbers are known, and the sum over a whole iteration."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.utils.flop_counter import FlopCounterMode

from harness.api import Adapter, Conditioning, DenoiserConfig, Prompt, Reward, SamplerConfig
from harness.config import resolve
from harness.flops import decoded_picture, denoiser_row, scored_picture
from harness.report.flops import training_flops, uncounted
from harness.report.records import Cell, Run
from harness.timing import count_flops
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.engine.fakes import plugin_file, settings
from tests.fakes import CPU, QuadraticReward, lab, requests


class Convolved(Reward):
    """A convolution of 3 to 5 channels, and a linear layer of all pixels to one number."""

    name, version, differentiable, role, unit = "convolved", "1", True, "proxy", "nothing"

    def __init__(self, device: torch.device, side: int = 16) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.kernel = torch.randn((5, 3, 3, 3), generator=generator, dtype=torch.float64)
        self.weight = torch.randn((1, 5 * side * side), generator=generator, dtype=torch.float64)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        return linear(conv2d(images_BCHW, self.kernel, padding=1).flatten(1), self.weight)[:, 0]

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class NoGradient(Convolved):
    """The same, its gradient not to be used."""

    name, differentiable = "no gradient", False


def run_of(units: dict[str, object], rewards: Sequence[type[Reward]], share: float) -> Run:
    """Records of one arm, as far as operations need them."""
    plan = {
        "arms": [{"label": "arm"}],
        "training_rewards": [],
        "rewards": [{"name": r.name, "differentiable": r.differentiable} for r in rewards],
    }
    empty = pd.DataFrame()
    timing = {"arm": {"rows_to_input_share": share}}
    return Run(Path(), plan, {}, (), Cell("", "", "", -1, ""), empty, empty, empty, timing, flops=units)


def test_a_denoiser_of_three_layers_by_hand(gaussian: GaussianModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 to 6, a low-rank update of rank 2 beside it, 6 to 3: a product of (m, k) and (k, n) is 2*m*k*n operations."""
    draw = torch.Generator().manual_seed(1)
    inward, outward = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((6, 3), (3, 6)))
    factors = {
        "down": nn.Parameter(torch.randn((2, 6), generator=draw, dtype=torch.float64)),
        "up": nn.Parameter(torch.randn((6, 2), generator=draw, dtype=torch.float64)),
        "idle": nn.Parameter(torch.zeros(1, dtype=torch.float64)),
    }

    def denoise(x_BCHW: Tensor, t: float, condition: Conditioning, adapter: Adapter) -> Tensor:
        hidden = linear(x_BCHW.flatten(1), inward)
        hidden = hidden + linear(linear(hidden, factors["down"]), factors["up"])
        return linear(hidden, outward)[:, :, None, None]

    monkeypatch.setattr(gaussian, "denoise", denoise)
    monkeypatch.setattr(gaussian, "adapter_parameters", lambda: factors)
    for guidance in (1.0, 4.0):
        found = denoiser_row(gaussian, SamplerConfig(steps=4, guidance=guidance), requests(gaussian, 2))
        wide, low = 2 * 3 * 6, 2 * 6 * 2
        assert found["forward"] == wide + low + low + wide
        # From the output to the hidden layer, then for each factor to itself, and from `up` to `down`.
        assert found["backward"] == wide + 3 * low
        assert found["backward_to_input"] == found["backward"] + low + wide
    assert all(p.grad is None for p in factors.values())


@pytest.mark.parametrize("pictures", [1, 3])
def test_a_reward_by_hand(gaussian: GaussianModel, pictures: int) -> None:
    """A convolution of c to d channels is 2*c*d*9 operations a pixel; its gradient to the picture takes as many."""
    images = torch.rand((pictures, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    batch = requests(gaussian, pictures)
    by_hand = 2 * 3 * 5 * 9 * 16 * 16 + 2 * 5 * 16 * 16
    assert scored_picture(Convolved(CPU), images, batch) == {"forward": by_hand, "backward": by_hand}
    assert scored_picture(NoGradient(CPU), images, batch) == {"forward": by_hand, "backward": 0}
    assert scored_picture(QuadraticReward(CPU), images, batch) == {"forward": 0, "backward": 0}


@pytest.mark.parametrize(
    ("method", "options", "checkpointing"),
    [
        ("draft", {"batch_size": 2}, "off"),
        ("draft", {"batch_size": 2}, "on"),
        ("draft-lv", {"batch_size": 2, "n": 1}, "inside"),
        ("ddpo", {"rollout_size": 2}, "off"),
    ],
)
def test_units_times_counts_are_what_an_iteration_takes(
    pipeline_directory: Path, method: str, options: dict[str, object], checkpointing: str
) -> None:
    """The counter around a whole iteration agrees with the units: exactly, up to what recomputing leaves out."""
    inside = checkpointing == "inside"
    model = StableDiffusion(str(pipeline_directory), CPU, torch.float64)
    if inside:
        model.configure(DenoiserConfig(checkpoint_inside=True))
    eta = 1.0 if method == "ddpo" else 0.0
    how = "off" if inside else checkpointing
    setup = lab(model, Convolved, steps=3, guidance=4.0, eta=eta, micro_batch=2, checkpointing=how)  # type: ignore[arg-type]
    tuner = setup.tuner(method, **options)
    batch = requests(model, tuner.requests_per_iteration)
    # First of all: prompts are encoded once a run and kept, which is part of no unit.
    latents = requests(model, 2, seed=7)
    sampler = setup.context.sampler
    units = {
        "denoiser_row": denoiser_row(model, sampler, latents),
        "decode": decoded_picture(model, latents),
        "rewards": {
            "convolved": scored_picture(Convolved(CPU), torch.zeros(2, 3, 16, 16, dtype=torch.float64), latents)
        },
    }
    model.condition(["", *(request.prompt.text for request in batch)])
    with FlopCounterMode(display=False) as counter:
        tuner.iterate(batch)

    cost = setup.meter.cost
    assert (cost.recomputed_rows > 0) == (checkpointing != "off")
    run = run_of(units, [Convolved], setup.meter.rows_to_input / cost.backward_rows)
    expected = training_flops(run, Cell("c", "arm", "convolved", 0, "completed"), cost.counts())
    # A step that is computed again stops at the last tensor that its backward pass needs.
    tolerance = 0.02 if checkpointing == "on" else 1e-9
    assert counter.get_total_flops() == pytest.approx(expected, rel=tolerance)


def test_rows_that_pass_their_gradient_on_are_told_apart(gaussian: GaussianModel) -> None:
    """Of a chain of four steps under gradient the first one begins at noise, which needs none."""
    setup = lab(gaussian, guidance=4.0)
    setup.tuner("draft", batch_size=2).iterate(requests(gaussian, 2))
    assert setup.meter.cost.backward_rows == 4 * 2 * 2
    assert setup.meter.rows_to_input == 3 * 2 * 2


def test_sums_of_rewards_count_each_component_once_a_picture() -> None:
    """Two of the three components have a gradient; the decoder is passed once a picture, not once a component."""
    units = {
        "denoiser_row": {"forward": 1.0, "backward": 10.0, "backward_to_input": 20.0},
        "decode": {"forward": 100.0, "backward": 1000.0},
        "rewards": {
            "convolved": {"forward": 1e4, "backward": 1e5},
            "quadratic": {"forward": 0.0, "backward": 0.0},
            "no gradient": {"forward": 1e6, "backward": 0.0},
        },
    }
    run = run_of(units, [Convolved, QuadraticReward, NoGradient], share=0.25)
    cell = Cell("c", "arm", "2*convolved+1*quadratic+0.5*no gradient", 0, "completed")
    cost = {"queries": 12.0, "reward_gradients": 8.0, "decodes": 4.0, "backward_rows": 8.0}
    cost |= {"forward_rows": 3.0, "gradient_rows": 8.0, "recomputed_rows": 5.0}
    rows = 16 * 1 + 6 * 10 + 2 * 20
    assert training_flops(run, cell, cost) == rows + 4 * 1100 + 4 * (1e4 + 1e6) + 4 * 1e5
    assert uncounted(run) == ["quadratic"]
    other = Cell("c", "arm", "another", 0, "completed")
    assert training_flops(run, other, cost) != training_flops(run, other, cost)  # not a number: never measured


def test_units_are_measured_once_a_run_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is written, left alone where it has all rewards; a failure is logged and costs nothing else."""
    plugins = plugin_file(tmp_path)
    reward = f"{plugins}:Quadratic"
    config = resolve(settings(plugins, tmp_path / "run"))
    (tmp_path / "run").mkdir()
    count_flops(config, tmp_path / "run", [reward])
    path = tmp_path / "run" / "flops.json"
    written = json.loads(path.read_text())
    assert set(written) == {"denoiser_row", "decode", "rewards"}
    assert written["rewards"] == {reward: {"forward": 0, "backward": 0}}
    monkeypatch.setattr(sys, "executable", shutil.which("false"))  # every process fails from now on
    count_flops(config, tmp_path / "run", [reward])
    assert json.loads(path.read_text()) == written
    assert not (tmp_path / "run" / "log.jsonl").exists()
    count_flops(config, tmp_path / "run", [reward, "another"])
    event = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert event["event"] == "operations not counted"
    assert event["detail"] == "no message"
    assert json.loads(path.read_text()) == written
