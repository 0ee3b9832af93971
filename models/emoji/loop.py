"""What every training stage shares: resumable state, averaged weights, the learning-rate curve, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's floating-point parameters.

    The decay is warmed up as (1 + t) / (10 + t), so that the average of a short training is not dominated
    by the random start.

    Attributes:
        shadow: parameter name to averaged value, detached, on the parameters' device.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        names = list(self.shadow)
        torch._foreach_lerp_(
            [self.shadow[name] for name in names], [parameters[name].detach() for name in names], 1 - decay
        )

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])


def cosine(step: int, total: int, warmup: int, final: float) -> float:
    """Return the factor on the learning rate: linear warm-up, then half a cosine from 1 down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    part = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * part))


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a crash at any moment leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


class Stage:
    """One resumable training: a module, its optimisers, averaged weights and a generator.

    A checkpoint is written every `save_every` seconds and at the end; `run` continues from it, with the
    generator's state, as if nothing had happened.

    Args:
        name: name of the checkpoint and of the progress lines.
        module: what is averaged; parameters that need a gradient are optimised.
        folder: where checkpoints go.
        steps: planned length, which also fixes the learning-rate curve.
        lr: peak learning rate of all optimisers.
        generator: source of all randomness of the stage.
        decay: of the averaged weights.
        warmup: steps of linear warm-up.
        final: last learning rate as a fraction of the peak.
        weight_decay: of all optimisers.
        orthogonal: matrices to train by Muon, whose updates have equal singular values; the rest is AdamW's.
        save_every: seconds between checkpoints.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        folder: Path,
        *,
        steps: int,
        lr: float,
        generator: torch.Generator,
        decay: float = 0.999,
        warmup: int = 200,
        final: float = 0.02,
        weight_decay: float = 1e-4,
        orthogonal: Sequence[nn.Parameter] = (),
        save_every: float = 120.0,
    ) -> None:
        self.name, self.module, self.path = name, module, folder / f"{name}.pt"
        self.steps, self.lr, self.warmup, self.final = steps, lr, min(warmup, max(1, steps // 4)), final
        self.generator, self.save_every = generator, save_every
        self.average = Average(module, decay)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        matrices = {id(p) for p in orthogonal}
        others = [p for p in self.trained if id(p) not in matrices]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        ]
        if orthogonal:
            # Updates as large as AdamW's, so that one learning rate serves both.
            self.optimisers.append(
                torch.optim.Muon(
                    orthogonal, lr=lr, weight_decay=weight_decay, ns_steps=3, adjust_lr_fn="match_rms_adamw"
                )
            )
        self.step, self.seconds = 0, 0.0

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "module": self.module.state_dict(),
            "average": self.average.shadow,
            "updates": self.average.updates,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        save_atomically(state, self.path)

    def resume(self) -> bool:
        """Load the checkpoint if there is one; return whether there was."""
        if not self.path.exists():
            return False
        state = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.average.shadow, self.average.updates = state["average"], state["updates"]
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def run(self, loss_of: Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]) -> None:
        """Train to the planned end, then leave the averaged weights in the module.

        Args:
            loss_of: draws a batch from the generator; returns the loss and figures for the progress line.
        """
        self.resume()
        start, saved, shown = time.monotonic() - self.seconds, time.monotonic(), 0.0
        while self.step < self.steps:
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = self.lr * cosine(self.step, self.steps, self.warmup, self.final)
            loss, figures = loss_of(self.generator)
            self.module.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            for optimiser in self.optimisers:
                optimiser.step()
            self.average.update(self.module)
            self.step += 1
            self.seconds = time.monotonic() - start
            if self.seconds - shown >= 10 or self.step == self.steps:
                shown = self.seconds
                left = self.seconds / self.step * (self.steps - self.step)
                told = " ".join(f"{key} {value:.4f}" for key, value in figures.items())
                print(
                    f"{self.name} {self.step}/{self.steps} loss {loss.item():.4f} {told} "
                    f"{self.seconds:.0f} s, {left:.0f} s left",
                    flush=True,
                )
            if time.monotonic() - saved >= self.save_every:
                saved = time.monotonic()
                self.save()
        self.save()
        self.average.copy_to(self.module)
