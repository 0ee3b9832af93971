"""What every method computes on two tiny models, in numbers: a change of any of them is seen.

The record is results/baselines/methods.json. It is made anew by:

    python -m tests.regression.methods

Recorded are the metrics of each update (loss, reward, norm of the gradient ...), the adapter after it, and generated
latents: unlike scores of 8-bit pictures they move with whatever changes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from harness.api import DiffusionModel, Generation, TrainedFineTuner, UserError
from harness.contracts.lab import Subject, lab, models, requests
from harness.registry import discover, load_method

RECORD = Path(__file__).resolve().parents[2] / "results" / "baselines" / "methods.json"
RENEW = "python -m tests.regression.methods"
UPDATES = 2
# On the platform of the record, and elsewhere: other vector instructions change last bits of the noise, which is drawn
# in single precision, and with them these numbers by up to 1e-5 (measured).
SAME_PLATFORM, ELSEWHERE = 1e-9, 1e-4
SETTINGS: Mapping[str, Any] = {"optimizer": {"learning_rate": 1e-2}}


def platform() -> dict[str, str]:
    """What rounding depends on."""
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    return {**packages, "vector_instructions": torch.backends.cpu.get_cpu_capability()}


def numbers(subject: Subject, model: DiffusionModel, eta: float) -> dict[str, float]:
    """Everything that a few updates and a generated batch come to, by name."""
    setup = lab(model, eta=eta)
    tuner = subject.tuner(setup, **(SETTINGS if "optimizer" in subject.finetuner.Config.model_fields else {}))
    found: dict[str, float] = {}
    if isinstance(tuner, TrainedFineTuner):
        size = tuner.requests_per_iteration
        for update in range(UPDATES):
            metrics = tuner.iterate(requests(model, size, first=update * size))
            found |= {f"update {update + 1}, {name}": float(value) for name, value in metrics.items()}
            found |= {f"update {update + 1}, adapter": _weigh(list(setup.parameters().values()))}
    latents = tuner.generate(requests(model, 4, seed=1), Generation(setup.context.sampler))
    found |= {f"latent {i + 1}": _weigh([latent]) for i, latent in enumerate(latents)}
    return found | {f"cost, {name}": float(value) for name, value in setup.meter.cost.counts().items()}


def _weigh(tensors: Sequence[torch.Tensor]) -> float:
    """One number that every entry moves, each by another weight: sum_i cos(i) x_i."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    return float((flat * torch.arange(len(flat), dtype=torch.float64).cos()).sum())


def record_of(name: str, gaussian: DiffusionModel, tiny: DiffusionModel) -> dict[str, Any]:
    """A method's version and numbers, on the closed-form model (with noise) and on a small network."""
    finetuner = load_method(name)
    subject = Subject(name, finetuner, gaussian, tiny)
    found = {
        f"{model}, {what}": value
        for model, loaded, eta in (("gaussian", gaussian, 1.0), ("tiny", tiny, 0.0))
        for what, value in numbers(subject, loaded, eta).items()
    }
    return {"version": finetuner.version, "numbers": found}


def moved(old: Mapping[str, float], new: Mapping[str, float], tolerance: float) -> list[str]:
    """Numbers that changed by more than the tolerance, relative to the larger one."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name), new.get(name)
        if was is None or now is None:
            found.append(f"{name}: {was} → {now}")
        elif abs(was - now) > tolerance * max(abs(was), abs(now)) and abs(was - now) > tolerance * 1e-3:
            found.append(f"{name}: {was:.9g} → {now:.9g}")
    return found


def read() -> dict[str, Any]:
    """The record in the repository."""
    content: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return content


def make() -> dict[str, Any]:
    """The record of all methods as they are now."""
    torch.set_num_threads(1)
    gaussian, tiny = models()
    known = {name: record_of(name, gaussian, tiny) for name in sorted(discover("methods"))}
    return {"about": f"Made by `{RENEW}`; see docs/ci.md.", "platform": platform(), "methods": known}


if __name__ == "__main__":
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    try:
        RECORD.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
    except UserError as error:
        sys.exit(str(error))
    print(f"wrote {RECORD}")
