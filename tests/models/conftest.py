"""Every family's tiny pipeline on disk, and the model read from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from models._latent_diffusion import LatentDiffusion
from tests.fakes import CPU
from tests.models.families import FAMILIES


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every family's directory, stored when first asked for. Read them, do not change them."""

    class Stored(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = FAMILIES[name].save(tmp_path_factory.mktemp("pipelines") / name.replace(" ", "-"))
            return self[name]

    return Stored()


@pytest.fixture(scope="session")
def models(directories: Mapping[str, Path]) -> Mapping[str, LatentDiffusion]:
    """Every family's model in float32, loaded when first asked for."""

    class Loaded(dict[str, LatentDiffusion]):
        def __missing__(self, name: str) -> LatentDiffusion:
            self[name] = FAMILIES[name].model(str(directories[name]), CPU)
            return self[name]

    return Loaded()
