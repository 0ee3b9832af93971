"""What the suites share: the model, its rewards and the default settings, loaded once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from harness.api import DiffusionModel, Randomness, Request, Reward
from harness.config import RunConfig, resolve
from harness.evaluation import noise_bank
from harness.registry import default_suite, discover, embedded_models, find_model, load_model, load_reward, load_suite

CPU = torch.device("cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let another model than the embedded one be timed."""
    parser.addoption("--bench-model", default="emoji", help="embedded model, pipeline directory, or gaussian")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Cells run with one thread each, so that is what is timed."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def config(request: pytest.FixtureRequest) -> RunConfig:
    """The preset `quick` with every method found."""
    methods = sorted(discover("methods"))
    return resolve({"methods": methods, "model": request.config.getoption("--bench-model"), "preset": "quick"})


@pytest.fixture(scope="session")
def model(config: RunConfig) -> DiffusionModel:
    """The model with a fresh adapter."""
    if config.model == "emoji" and "emoji" not in embedded_models():
        pytest.skip("the embedded model's weights (models/emoji/pipeline) are absent; give --bench-model")
    loaded = load_model(find_model(config.model), CPU, torch.float32, None)
    loaded.add_adapter(config.adapter, Randomness(0, "benchmark"))
    return loaded


@pytest.fixture(scope="session")
def requests(config: RunConfig, model: DiffusionModel) -> Sequence[Request]:
    """64 requests of the model's own suite."""
    prompts = load_suite(default_suite(find_model(config.model))).training
    return [noise_bank(model, prompts[i % len(prompts)], i) for i in range(64)]


@pytest.fixture(scope="session", params=["emoji-3d", "emoji-clip", "jpeg-compressibility"])
def reward(request: pytest.FixtureRequest) -> Reward:
    """A differentiable reward."""
    try:
        return load_reward(request.param)(CPU)
    except OSError as error:
        pytest.skip(f"the weights of {request.param} are absent: {error}")
