"""What every method must hold, for each that is found in methods/ or installed: the contracts of `harness check`.

Small settings, by the names of fields, are SMALL in harness/contracts/lab.py.
"""

from __future__ import annotations

import pytest

from harness.api import DiffusionModel, FineTuner
from harness.contracts.check import contracts_of, verify
from harness.contracts.lab import Subject
from harness.contracts.outcome import Contract
from harness.registry import discover, load_method

METHODS = {name: load_method(name) for name in sorted(discover("methods"))}
PAIRS = [(method, contract) for method, finetuner in METHODS.items() for contract in contracts_of(finetuner)]


def test_methods_are_found() -> None:
    """Those of the DRaFT paper are there, and so is every file's."""
    assert {"draft", "draft-k", "draft-lv", "refl", "ddpo", "ddpo-sf"} <= METHODS.keys()
    assert all(issubclass(finetuner, FineTuner) for finetuner in METHODS.values())


@pytest.mark.parametrize(("method", "contract"), PAIRS, ids=[f"{method}-{c.name}" for method, c in PAIRS])
def test_contract(method: str, contract: Contract, gaussian: DiffusionModel, tiny_model: DiffusionModel) -> None:
    """It holds, or says nothing about the method."""
    outcome = verify(contract, Subject(method, METHODS[method], gaussian, tiny_model))
    assert outcome.state != "FAILED", f"{outcome.why}; {contract.remedy}"
