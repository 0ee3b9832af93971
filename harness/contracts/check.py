"""Runs the contracts of a method one after the other, and says of each what came of it."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence

import torch

from harness.api import FineTuner, TrainedFineTuner
from harness.contracts.inference import INFERENCE
from harness.contracts.lab import Subject
from harness.contracts.outcome import Broken, Contract, NotApplicable, Outcome
from harness.contracts.shared import COMMON
from harness.contracts.trained import TRAINED
from harness.errors import UserError, nearest


def contracts_of(finetuner: type[FineTuner]) -> tuple[Contract, ...]:
    """The contracts of a method's kind."""
    own = TRAINED if issubclass(finetuner, TrainedFineTuner) else INFERENCE
    return (*own, *COMMON)


def verify(contract: Contract, subject: Subject) -> Outcome:
    """Whether one contract holds. A crash of the method is a failure, too."""
    start = time.perf_counter()
    try:
        contract.check(subject)
    except NotApplicable as reason:
        return Outcome(contract, "n/a", str(reason), time.perf_counter() - start)
    except Broken as seen:
        return Outcome(contract, "FAILED", str(seen), time.perf_counter() - start)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == _source(subject):
                place = frame  # the last line of the method's own
        where = f"{place.filename.split('/')[-1]}, line {place.lineno}"
        return Outcome(contract, "FAILED", f"{what} ({where})", time.perf_counter() - start)
    return Outcome(contract, "passed", "", time.perf_counter() - start)


def _source(subject: Subject) -> str:
    return str(sys.modules[subject.finetuner.__module__].__file__)


def check(subject: Subject, only: Sequence[str] = ()) -> Iterator[Outcome]:
    """The outcome of each contract, or of those named.

    Raises:
        UserError: There is no contract of that name.
    """
    contracts = {contract.name: contract for contract in contracts_of(subject.finetuner)}
    for name in only:
        if name not in contracts:
            raise UserError(f"there is no contract {name!r} for {subject.name}; {nearest(name, list(contracts))}")
    torch.set_num_threads(1)  # the models are tiny
    for name in only or contracts:
        yield verify(contracts[name], subject)


def lines(outcome: Outcome) -> Iterator[str]:
    """A contract's lines of the table."""
    yield f"{outcome.state:<7} {outcome.seconds:5.1f} s  {outcome.contract.name:<21} {outcome.contract.promise}"
    if outcome.state == "FAILED":
        yield f"{'':<17}why:    {outcome.why}"
        yield f"{'':<17}remedy: {outcome.contract.remedy}"
    elif outcome.why:
        yield f"{'':<17}{outcome.why}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many passed, failed, and did not apply."""
    states = [outcome.state for outcome in outcomes]
    seconds = sum(outcome.seconds for outcome in outcomes)
    counts = {"passed": states.count("passed"), "failed": states.count("FAILED"), "not applicable": states.count("n/a")}
    return ", ".join(f"{count} {what}" for what, count in counts.items()) + f", in {seconds:.0f} s"
