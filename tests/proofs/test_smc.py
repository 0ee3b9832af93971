"""Steering with particles reaches the tilted Gaussian with every potential."""

from __future__ import annotations

import pytest

from tests.methods.tilted import assert_tilted


@pytest.mark.slow
@pytest.mark.parametrize("potential", ["diff", "max", "add"])
def test_reaches_the_tilted_gaussian(potential: str) -> None:
    """Mean and variance within four standard errors, of 1200 numbers, whatever weighs the particles on the way."""
    assert_tilted(potential, particles=64, pictures=400)
