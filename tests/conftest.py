"""Fixtures that several folders share: a tiny pipeline on disk, and the model read from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.contracts.tiny import save_tiny_pipeline
from models.gaussian import GaussianModel
from models.stable_diffusion import StableDiffusion


@pytest.fixture(scope="session")
def pipeline_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `StableDiffusionPipeline` of random weights that predicts noise. Read it, do not change it."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def tiny_model(pipeline_directory: Path) -> StableDiffusion:
    """The tiny pipeline in double precision. Its adapter is replaced by whoever adds one."""
    return StableDiffusion(str(pipeline_directory), torch.device("cpu"), torch.float64)


@pytest.fixture
def gaussian() -> GaussianModel:
    """The closed-form model in double precision."""
    return GaussianModel()
