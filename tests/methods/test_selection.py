"""Selection at generation time: null identities, the order statistics of a Gaussian, and what a picture costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from harness.api import Diverged, Generation, Prompt, Request, Reward
from harness.registry import load_method
from harness.sampling import generate
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import BrightnessReward, BrokenReward, Lab, lab, requests

SINGLE: dict[str, dict[str, Any]] = {"best-of-n": {"n": 1}, "prompt-search": {"suffixes": [""]}}
SEVERAL: dict[str, dict[str, Any]] = {"best-of-n": {"n": 5}, "prompt-search": {"suffixes": ["", " b", " cd"]}}


class LettersReward(Reward):
    """The mean pixel, plus ten for each letter of the prompt that it is given."""

    name, version, differentiable, role, unit = "letters", "1", False, "proxy", "pixels"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        letters = torch.tensor([10.0 * len(prompt.text) for prompt in prompts], dtype=images_BCHW.dtype)
        return images_BCHW.flatten(1).mean(1) + letters

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


class WavyReward(Reward):
    """A quickly oscillating function of the mean pixel, so that no suffix is the best for every picture."""

    name, version, differentiable, role, unit = "wavy", "1", False, "proxy", "nothing"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Scores (B,)."""
        return torch.sin(1e4 * images_BCHW.flatten(1).mean(1))

    def applies(self, prompt: Prompt) -> bool:
        """To all."""
        return True


def pictures(setup: Lab, method: str, batch: Sequence[Request], **settings: Any) -> Tensor:
    """What a method generates with the lab's sampler."""
    found: Tensor = setup.tuner(method, **settings).generate(batch, Generation(setup.context.sampler))
    return found


def base(setup: Lab, batch: Sequence[Request], text: str = "") -> Tensor:
    """What the base sampler generates, for prompts that go on with `text`."""
    told = [replace(r, prompt=replace(r.prompt, text=r.prompt.text + text)) for r in batch]
    return generate(setup.inner, told, Generation(setup.context.sampler, lora_scale=0.0))


def brightness(latents: Tensor) -> Tensor:
    """The reward of the Gaussian's pictures, which are its latents."""
    return latents.flatten(1).mean(1)


def expected_maximum(n: int) -> float:
    """Of n standard normal numbers, by quadrature of x n f(x) F(x)^(n - 1)."""
    value, _ = integrate.quad(lambda x: x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1), -10, 10)
    return float(value)


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_candidate_is_the_base_sampler(tiny_model: StableDiffusion, method: str, eta: float) -> None:
    """Bit for bit, with the adapter attached and away from zero, also where the sampler is stochastic."""
    setup = lab(tiny_model, BrightnessReward, eta=eta)
    batch = requests(tiny_model, 3)
    assert torch.equal(pictures(setup, method, batch, **SINGLE[method]), base(setup, batch))
    adapted = generate(setup.inner, batch, Generation(setup.context.sampler))
    assert not torch.equal(adapted, base(setup, batch))


@pytest.mark.parametrize("n", [4, 16])
def test_the_gain_is_the_order_statistic_of_a_gaussian(n: int) -> None:
    """E[max of N] standard deviations for a reward that is linear in the latent: 1.77 at N = 16."""
    assert expected_maximum(16) == pytest.approx(1.766, abs=1e-3)
    model, count = GaussianModel(), 3000
    setup = lab(model, BrightnessReward, guidance=1.0, micro_batch=count)
    batch = requests(model, count)
    plain = brightness(base(setup, batch))
    gain = (brightness(pictures(setup, "best-of-n", batch, n=n)).mean() - plain.mean()) / plain.std()
    # The chain is affine in x_T, so that the reward is exactly Gaussian; six standard errors of the two means.
    assert float(gain) == pytest.approx(expected_maximum(n), abs=6 * math.sqrt(1.5 / count))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_candidates_are_distinct_and_independent_of_each_other(gaussian: GaussianModel, eta: float) -> None:
    """The first is the request; every other has a latent and, with a stochastic sampler, step noise of its own."""
    setup = lab(gaussian, BrightnessReward, guidance=1.0, eta=eta)
    tuner, batch = setup.tuner("best-of-n", n=4), requests(gaussian, 200)
    made = [base(setup, [tuner.candidate(request, j) for request in batch]) for j in range(4)]
    assert torch.equal(made[0], base(setup, batch))
    table = torch.corrcoef(torch.stack([brightness(latents) for latents in made]))
    assert float((table - torch.eye(4)).abs().max()) < 0.35
    steps = {(tuner.candidate(r, j).prompt.id, tuner.candidate(r, j).noise_id) for r in batch for j in range(4)}
    assert len(steps) == 4 * len(batch)


def test_prompt_search_keeps_the_best_suffix(tiny_model: StableDiffusion) -> None:
    """Picture by picture the best of what the suffixes give with the same latent; no suffix wins all."""
    setup, batch = lab(tiny_model, WavyReward), requests(tiny_model, 6)
    suffixes = SEVERAL["prompt-search"]["suffixes"]
    made = torch.stack([base(setup, batch, text) for text in suffixes])
    scores = torch.stack([torch.sin(1e4 * brightness(tiny_model.decode(latents))) for latents in made])
    chosen = scores.argmax(0)
    assert len(set(chosen.tolist())) > 1
    expected = made[chosen, torch.arange(len(batch))]
    assert torch.equal(pictures(setup, "prompt-search", batch, suffixes=suffixes), expected)


def test_the_reward_reads_the_prompt_that_was_asked_for(tiny_model: StableDiffusion) -> None:
    """A reward that likes long prompts chooses as one that does not read them."""
    batch = requests(tiny_model, 6)
    found = [
        pictures(lab(tiny_model, reward), "prompt-search", batch, **SEVERAL["prompt-search"])
        for reward in (LettersReward, BrightnessReward)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("method", SEVERAL)
def test_pictures_do_not_depend_on_their_batch(tiny_model: StableDiffusion, method: str) -> None:
    """Any split and order of the requests, and any micro-batch, gives the same pictures."""
    batch = requests(tiny_model, 7)
    whole = pictures(lab(tiny_model, BrightnessReward), method, batch, **SEVERAL[method])
    for micro_batch in (1, 3):
        split = pictures(lab(tiny_model, BrightnessReward, micro_batch=micro_batch), method, batch, **SEVERAL[method])
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-9)
    setup = lab(tiny_model, BrightnessReward)
    apart = torch.cat([pictures(setup, method, part, **SEVERAL[method]) for part in (batch[4:][::-1], batch[:4])])
    torch.testing.assert_close(apart, torch.cat([whole[4:].flip(0), whole[:4]]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", SEVERAL)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_picture_costs_what_was_planned(gaussian: GaussianModel, method: str, guidance: float) -> None:
    """The meter of seven pictures is seven times the plan, in uneven parts."""
    setup = lab(gaussian, BrightnessReward, guidance=guidance, micro_batch=3)
    tuner = setup.tuner(method, **SEVERAL[method])
    tuner.generate(requests(gaussian, 7), Generation(setup.context.sampler))
    plan = tuner.planned_cost()
    assert asdict(setup.meter.cost) == asdict(plan.expected * 7) == asdict(plan.maximal * 7)
    candidates = tuner.candidates
    assert candidates > 1
    rows = candidates * 4 * (1 if guidance == 1.0 else 2)
    assert (plan.expected.queries, plan.expected.decodes, plan.expected.denoiser_rows) == (candidates, candidates, rows)


@pytest.mark.parametrize("method", SEVERAL)
def test_a_reward_that_is_no_number_diverges(gaussian: GaussianModel, method: str) -> None:
    """No picture is chosen by comparing with not-a-number."""
    with pytest.raises(Diverged, match="the reward of the candidates is nan"):
        pictures(lab(gaussian, BrokenReward), method, requests(gaussian, 2), **SEVERAL[method])


@pytest.mark.parametrize("suffixes", [[], [", oil"], ["", ", oil", ", oil"]])
def test_suffixes_start_with_none_and_differ(suffixes: list[str]) -> None:
    """The plain prompt is among the candidates, and no candidate is paid for twice."""
    with pytest.raises(ValueError, match="suffixes"):
        load_method("prompt-search").Config.model_validate({"suffixes": suffixes})
