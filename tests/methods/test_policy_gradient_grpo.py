"""GRPO: groups of a prompt's pictures, their advantages, and what it shares with DDPO."""

from __future__ import annotations

import math

import pytest
import torch

from harness.api import UserError
from methods.grpo import GroupAdvantages
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion
from tests.fakes import assert_close, gradients, lab, requests

MOVING = {"learning_rate": 1e-2, "weight_decay": 0.0}


def test_advantages_by_hand() -> None:
    """Each group on its own: less its mean, over its standard deviation (the population's), clipped at the end."""
    rewards = torch.tensor([1.0, 3.0, 5.0, 10.0, 10.0, 40.0], dtype=torch.float64)
    found = GroupAdvantages(3, clip=1.3).of([], rewards)
    first, second = math.sqrt(8 / 3) + 1e-6, math.sqrt(200) + 1e-6
    assert found.shape == (6, 1)
    assert found.flatten().tolist() == pytest.approx([-2 / first, 0, 2 / first, -10 / second, -10 / second, 1.3])
    assert 20 / second > 1.3  # the last was clipped


def test_equal_rewards_in_a_group_teach_nothing() -> None:
    """A group without spread has no advantage, whatever the other groups do."""
    found = GroupAdvantages(2, clip=5.0).of([], torch.tensor([0.25, 0.25, 0.0, 1.0], dtype=torch.float64))
    assert found.flatten().tolist() == pytest.approx([0.0, 0.0, -1.0, 1.0], abs=1e-5)
    assert found.flatten().tolist()[:2] == [0.0, 0.0]


def test_a_request_becomes_a_group(gaussian: GaussianModel) -> None:
    """The first picture is the request itself; the others share its prompt and nothing else, and can be had again."""
    tuner = lab(gaussian).tuner("grpo", rollout_size=12, group_size=4)
    assert tuner.requests_per_iteration == 3
    stream = requests(gaussian, 3, prompts=3)
    groups = [tuner.group(request) for request in stream]
    for request, group in zip(stream, groups, strict=True):
        assert group[0] is request
        assert [picture.prompt for picture in group] == [request.prompt] * 4
    pictures = [picture for group in groups for picture in group]
    assert len({picture.noise_id for picture in pictures}) == 12
    assert len({tuple(picture.noise.flatten().tolist()) for picture in pictures}) == 12
    again = lab(gaussian).tuner("grpo", rollout_size=12, group_size=4).group(stream[1])
    assert all(torch.equal(one.noise, other.noise) for one, other in zip(again, groups[1], strict=True))
    assert [picture.noise_id for picture in again] == [picture.noise_id for picture in groups[1]]


def test_initial_latents_of_a_group_are_standard_normal(gaussian: GaussianModel) -> None:
    """Mean 0, variance 1, and no correlation within a group, within four standard errors."""
    tuner = lab(gaussian).tuner("grpo", rollout_size=4, group_size=4)
    latents = torch.stack(
        [torch.stack([p.noise.flatten() for p in tuner.group(r)]) for r in requests(gaussian, 1000, prompts=8)]
    )
    n = latents.numel()
    assert abs(latents.mean()) < 4 / math.sqrt(n)
    assert abs(latents.var() - 1) < 4 * math.sqrt(2 / n)
    for one in range(4):
        for other in range(one):
            assert abs((latents[:, one] * latents[:, other]).mean()) < 4 / math.sqrt(3000)


def test_costs_a_query_for_each_picture(gaussian: GaussianModel) -> None:
    """Three requests in groups of four are twelve pictures on the meter, as planned."""
    setup = lab(gaussian, guidance=1.0)
    tuner = setup.tuner("grpo", rollout_size=12, group_size=4)
    tuner.iterate(requests(gaussian, 3))
    assert setup.meter.cost == tuner.planned_cost().expected
    assert setup.meter.cost.queries == 12


@pytest.mark.parametrize(("settings", "message"), [({"group_size": 1}, "2 or more"), ({"group_size": 3}, "multiple")])
def test_groups_that_cannot_be_are_refused(gaussian: GaussianModel, settings: dict[str, int], message: str) -> None:
    """A group of one has no advantage, and a rollout is whole groups."""
    with pytest.raises(UserError, match=message):
        lab(gaussian).tuner("grpo", rollout_size=8, **settings)


def test_one_group_is_ddpo_on_the_rollouts_own_statistics(tiny_model: StableDiffusion) -> None:
    """With one group and no memory both weigh the same pictures alike: the same parameters after two steps."""
    setup = lab(tiny_model)
    tuner = setup.tuner("grpo", rollout_size=6, group_size=6, optimizer=MOVING)
    stream = requests(tiny_model, 1)
    pictures = tuner.group(stream[0])
    tuner.iterate(stream)
    found = {name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()}
    ddpo = lab(tiny_model)
    ddpo.tuner("ddpo", rollout_size=6, per_prompt_minimum=1000, optimizer=MOVING).iterate(pictures)
    assert_close(found, {name: p.detach() for name, p in ddpo.inner.adapter_parameters().items()}, 1e-12)


def test_kl_is_added_to_the_advantages(gaussian: GaussianModel) -> None:
    """The gradient is linear in beta, and differs from that without KL."""
    batch = requests(gaussian, 2)
    grads = [
        gradients(
            lab(gaussian).tuner("grpo", rollout_size=8, group_size=4, updates_per_rollout=1, kl_weight=beta), batch
        )
        for beta in (0.0, 0.5, 1.0)
    ]
    step = {name: grads[1][name] - grads[0][name] for name in grads[0]}
    assert_close({name: grads[2][name] - grads[0][name] for name in step}, {name: 2 * g for name, g in step.items()})
    assert all(g.abs().max() > 1e-6 for g in step.values())


def test_ratio_is_one_until_the_first_optimiser_step(gaussian: GaussianModel) -> None:
    """`ratio_deviation` is 0 with one optimiser step per rollout and more than 0 with two."""
    found = []
    for updates in (1, 2):
        settings = {"rollout_size": 8, "group_size": 4, "updates_per_rollout": updates, "optimizer": MOVING}
        found.append(lab(gaussian).tuner("grpo", **settings).iterate(requests(gaussian, 2))["ratio_deviation"])
    assert found[0] < 1e-9
    assert found[1] > 1e-6


@pytest.mark.parametrize("micro_batch", [3])
def test_results_do_not_depend_on_micro_batches(tiny_model: StableDiffusion, micro_batch: int) -> None:
    """Groups may be split between micro-batches."""
    after = []
    for size in (16, micro_batch):
        setup = lab(tiny_model, micro_batch=size)
        tuner = setup.tuner("grpo", rollout_size=4, group_size=2, optimizer=MOVING, kl_weight=0.1)
        tuner.iterate(requests(tiny_model, 2))
        after.append({name: p.detach().clone() for name, p in setup.inner.adapter_parameters().items()})
    assert_close(after[1], after[0], 1e-9)
