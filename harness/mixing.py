"""Mixes adapters that one arm trained on several rewards into one adapter (DRaFT calls it LoRA interpolation).

    theta = theta0 + sum_k w_k (alpha/rank) B_k A_k

Products are mixed, not factors: (sum w B)(sum w A) has the cross terms B_i A_j, which nobody trained. The sum becomes
one adapter, truncated to a rank (`harness.lora_products`); what that leaves out is the error that is recorded.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from harness import store
from harness.api import AdapterConfig, Generation, Randomness, Request, UserError
from harness.config import MixConfig, RunConfig, explain
from harness.errors import nearest
from harness.evaluation import save_pictures
from harness.grid import Grid, slug
from harness.lora_products import Mixed, factor_pairs, mix_products
from harness.records import score_rows
from harness.sampling import generate
from harness.workshop import Workshop

VARIANT = "mix"
Say = Callable[[str], None]


# --------------- what was asked for


@dataclass(frozen=True)
class Mix:
    """A mix that can be made: known names, finite weights, and a rank."""

    arm: str
    weights: Mapping[str, float]
    rank: int

    @property
    def label(self) -> str:
        """`0.5*emoji-3d+0.5*emoji-clip`; rewards that are sums themselves stand in brackets."""
        return "+".join(_term(weight, reward) for reward, weight in self.weights.items())

    @property
    def slug(self) -> str:
        """Name of its directory."""
        return f"{slug(self.arm)}--{slug(self.label)}--rank{self.rank}"


def _term(weight: float, reward: str) -> str:
    number = f"{weight:g}" if float(f"{weight:g}") == weight else repr(weight)
    return f"{number}*({reward})" if "*" in reward or "+" in reward else f"{number}*{reward}"


def parse_weights(text: str) -> dict[str, float]:
    """`emoji-3d=0.5,emoji-clip=0.5`, in the order given.

    Raises:
        UserError: The text has another form, or names a reward twice.
    """
    weights: dict[str, float] = {}
    for item in text.split(","):
        name, equals, value = item.strip().rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise UserError(f"--weights {text!r} is not understood: write emoji-3d=0.5,emoji-clip=0.5")
        if name.strip() in weights:
            raise UserError(f"--weights {text!r} names {name.strip()} twice; give it one weight")
        weights[name.strip()] = weight
    return weights


def pick_arm(plan: Mapping[str, Any], arm: str | None) -> str:
    """The arm that was asked for; else the only trained one, else the reference.

    Args:
        plan: The content of run.json.
        arm: As given, or None.

    Raises:
        UserError: Nothing was asked for, and neither default exists.
    """
    if arm is not None:
        return arm
    trained = _trained_arms(plan)
    if len(trained) == 1:
        return trained[0]
    if plan["reference_arm"] in trained:
        return str(plan["reference_arm"])
    raise UserError(f"which arm's adapters? Give --arm with one of: {', '.join(trained) or 'none was trained'}")


def resolve_mix(wanted: MixConfig, plan: Mapping[str, Any]) -> Mix:
    """Check a mix against the plan of its run (run.json).

    Raises:
        UserError: An arm or reward that the run has not trained, or a weight that is no number.
    """
    trained, rewards = _trained_arms(plan), list(plan["training_rewards"])
    if wanted.arm not in trained:
        labels = [arm["label"] for arm in plan["arms"]]
        if wanted.arm in labels:
            raise UserError(
                f"{wanted.arm} trains no adapter, so there is nothing to mix; {nearest(wanted.arm, trained)}"
            )
        raise UserError(f"there is no arm {wanted.arm!r} in this run; {nearest(wanted.arm, trained)}")
    if not wanted.weights:
        raise UserError(f"a mix needs weights, as in {rewards[0]}=0.5; the run trained on {', '.join(rewards)}")
    for reward, weight in wanted.weights.items():
        if reward not in rewards:
            raise UserError(f"the run did not train on {reward!r}; {nearest(reward, rewards)}")
        if not math.isfinite(weight):
            raise UserError(f"the weight of {reward} is {weight:g}; give a finite number")
    return Mix(wanted.arm, wanted.weights, wanted.rank or int(plan["config"]["adapter"]["rank"]))


def _trained_arms(plan: Mapping[str, Any]) -> list[str]:
    return [str(arm["label"]) for arm in plan["arms"] if arm.get("kind", "training") == "training"]


def config_of(plan: Mapping[str, Any], run_dir: Path, device: str) -> RunConfig:
    """The configuration that a run was last continued with; settings that this version does not know are left out.

    Raises:
        UserError: It is not valid any more.
    """
    known = {key: value for key, value in plan["config"].items() if key in RunConfig.model_fields}
    try:
        return RunConfig.model_validate({**known, "out": run_dir, "device": device})
    except ValidationError as error:
        raise UserError(f"{run_dir}/run.json: {explain(error, RunConfig)}") from None


def check_mixes(grid: Grid) -> None:
    """Refuse what the run's configuration asks to mix and cannot be mixed, before anything is spent.

    Raises:
        UserError: Unknown arms or rewards, or a model without LoRA.
    """
    if grid.config.mixes:
        plan = grid.describe({})
        for wanted in grid.config.mixes:
            resolve_mix(wanted, plan)
        factor_pairs(list(grid.model.adapter_parameters()))


# --------------- making one


def make_mixes(grid: Grid, run_dir: Path, say: Say) -> None:
    """Make the mixes of the run's configuration that are not there yet. The caller owns the run's lock."""
    plan = store.read_json(run_dir / "run.json")
    for wanted in grid.config.mixes:
        mix = resolve_mix(wanted, plan)
        if not ready_cells(run_dir, plan, mix)[0]:
            say(f"{mix.slug}: no seed has all the cells that it mixes")
            continue
        make_mix(grid, run_dir, mix, say)


def ready_cells(run_dir: Path, plan: Mapping[str, Any], mix: Mix) -> tuple[dict[int, dict[str, str]], dict[int, str]]:
    """The cells to mix by seed and reward, for seeds that have all of them; and why other seeds are left out."""
    names = {(c["arm"], c["reward"], int(c["seed"])): str(c["cell"]) for c in plan["cells"]}
    ready: dict[int, dict[str, str]] = {}
    left_out: dict[int, str] = {}
    for seed in plan["seeds"]:
        found = {reward: names.get((mix.arm, reward, seed)) for reward in mix.weights}
        for reward, cell in found.items():
            state = "not planned" if cell is None else _status(run_dir, cell).get("state") or "not finished"
            if state != "completed":
                left_out.setdefault(seed, f"{cell or f'{mix.arm} on {reward}'} is {state}")
        if seed not in left_out:
            ready[seed] = {reward: str(cell) for reward, cell in found.items()}
    return ready, left_out


def make_mix(grid: Grid, run_dir: Path, mix: Mix, say: Say) -> Path:
    """Mix, export and score every seed that is not there yet; the caller owns the run's lock.

    Seeds that were added to the run since are added to the mix, and those whose cells or evaluation changed are made
    again.

    Returns:
        The directory of the mix.

    Raises:
        UserError: No seed has all the cells that are mixed, or the adapter is no LoRA.
    """
    plan = store.read_json(run_dir / "run.json")
    ready, left_out = ready_cells(run_dir, plan, mix)
    if not ready:
        why = "; ".join(left_out.values()) or "it has no seeds"
        raise UserError(f"{run_dir} has no seed with completed cells of {mix.arm} on all of {mix.label}: {why}")
    directory, record = _existing(run_dir, mix)
    mix = replace(mix, weights=record.get("weights", mix.weights))  # in the order in which they were first given
    made_of = {seed: _made_of(run_dir, grid, cells) for seed, cells in ready.items()}
    done = [seed for seed in ready if record.get("made_of", {}).get(str(seed)) == made_of[seed]]
    for seed, why in left_out.items():
        say(f"seed {seed} is left out: {why}")
    if len(done) == len(ready) == len(record["seeds"]):
        say(f"{mix.slug} is there: nothing to do")
        return directory
    with _one_thread():
        mixed = {seed: _mixed(run_dir, mix, cells) for seed, cells in ready.items() if seed not in done}
        kept = {seed: made_of[seed] for seed in done}
        making = _Making(Workshop(grid), run_dir, directory, mix, plan, record, kept, left_out)
        if record:
            making.write()  # without what is made again
        for seed, adapter in mixed.items():
            making.add(seed, ready[seed], made_of[seed], adapter)
            worst = f" (worst module {adapter.worst:.3g}: {adapter.worst_module})" if adapter.error else ""
            say(f"seed {seed}: rank {mix.rank} of at most {adapter.exact_rank}, error {adapter.error:.3g}{worst}")
    return directory


class _Making:
    """A mix while its seeds are made, beyond those kept; what is on disk is whole after each."""

    def __init__(
        self,
        workshop: Workshop,
        run_dir: Path,
        directory: Path,
        mix: Mix,
        plan: Mapping[str, Any],
        record: Mapping[str, Any],
        kept: Mapping[int, dict[str, Any]],
        left_out: Mapping[int, str],
    ) -> None:
        self.workshop, self.run_dir, self.directory, self.mix = workshop, run_dir, directory, mix
        self.left_out = {str(seed): why for seed, why in left_out.items()}
        self.method = next(str(arm["method"]) for arm in plan["arms"] if arm["label"] == mix.arm)
        self.made_of = {str(seed): content for seed, content in kept.items()}
        self.errors: dict[str, Any] = {seed: record["error"][seed] for seed in self.made_of}
        self.exact_rank = int(record.get("exact_rank", 0))
        rows = pd.read_parquet(directory / "scores.parquet").to_dict("records") if kept else []
        self.rows: list[Any] = [row for row in rows if row["seed"] in kept]

    def add(self, seed: int, cells: Mapping[str, str], made_of: dict[str, Any], mixed: Mixed) -> None:
        """One seed: attach, export, generate and score; mix.json, which says that it is there, is written last."""
        folder = self.directory / f"seed{seed}"
        self._attach(mixed, _adapter(self.run_dir, next(iter(cells.values()))))
        self._export(folder / "adapter")
        self.rows += self._scored(seed, cells, folder)
        self.made_of[str(seed)] = made_of
        self.errors[str(seed)] = {"all": mixed.error, "worst": mixed.worst, "worst_module": mixed.worst_module}
        self.exact_rank = mixed.exact_rank
        self.write()

    def write(self) -> None:
        """The records of the seeds that are there."""
        store.write_parquet(self.directory / "scores.parquet", self.rows, store.SCORE_COLUMNS)
        store.write_json(self.directory / "mix.json", self._record())

    def _attach(self, mixed: Mixed, like: AdapterConfig) -> None:
        model = self.workshop.model
        config = AdapterConfig(rank=self.mix.rank, targets=like.targets)
        model.add_adapter(config, Randomness(0, "mixed adapter"))  # every value is replaced
        for name, parameter in model.adapter_parameters().items():
            parameter.data.copy_(mixed.parameters[name])

    def _export(self, folder: Path) -> None:
        model = self.workshop.model
        with tempfile.TemporaryDirectory() as temporary:
            model.save_adapter(Path(temporary))
            for path in sorted(Path(temporary).iterdir()):
                store.write_bytes(folder / path.name, path.read_bytes())
        parameters = {name: p.detach().cpu().contiguous() for name, p in model.adapter_parameters().items()}
        store.write_bytes(folder / "parameters.safetensors", save(parameters))

    def _scored(self, seed: int, cells: Mapping[str, str], folder: Path) -> list[dict[str, Any]]:
        """Rows of the last split (held-out) with the latents, the sampler and the rewards of the final evaluation."""
        model, evaluator = self.workshop.model, self.workshop.evaluator
        last = list(evaluator.splits)[-1]
        evaluated = [item for item in evaluator.final_requests() if item.split == last]

        def mixture(requests: Sequence[Request], generation: Generation) -> Tensor:
            return generate(model, requests, generation)

        pictures, _ = evaluator.pictures(mixture, [item.request for item in evaluated])
        if self.workshop.keep_images:
            save_pictures(folder, pictures, evaluated)
        identity = {
            "cell": f"mix--{self.mix.slug}--seed{seed}",
            "arm": self.mix.arm,
            "method": self.method,
            "training_reward": self.mix.label,
            "seed": seed,
        }
        spent = [_status(self.run_dir, cell) for cell in cells.values()]
        position = {
            "iteration": sum(int(status["iterations"]) for status in spent),
            "queries": sum(float(status["cost"]["queries"]) for status in spent),
            "denoiser_rows": sum(float(status["cost"]["denoiser_rows"]) for status in spent),
            "train_seconds": sum(float(status["seconds"]["train"]) for status in spent),
        }
        return score_rows(identity, position, "final", evaluator.score(pictures, evaluated), VARIANT)

    def _record(self) -> dict[str, Any]:
        seeds = sorted(int(seed) for seed in self.made_of)
        adapters = [path for seed in seeds for path in sorted((self.directory / f"seed{seed}" / "adapter").iterdir())]
        return {
            "slug": self.mix.slug,
            "arm": self.mix.arm,
            "method": self.method,
            "training_reward": self.mix.label,
            "weights": dict(self.mix.weights),
            "rank": self.mix.rank,
            "exact_rank": self.exact_rank,
            "seeds": seeds,
            "error": self.errors,
            "left_out": self.left_out,
            "files": ["scores.parquet", *(str(path.relative_to(self.directory)) for path in adapters)],
            "made_of": self.made_of,
            "evaluation_rewards": self.workshop.evaluator.versions,
        }


def _status(run_dir: Path, cell: str) -> dict[str, Any]:
    return store.read_json(run_dir / "cells" / cell / "status.json")


def _adapter(run_dir: Path, cell: str) -> AdapterConfig:
    identity = store.read_json(run_dir / "cells" / cell / "identity.json")
    return AdapterConfig.model_validate(identity["training"]["adapter"])


def _mixed(run_dir: Path, mix: Mix, cells: Mapping[str, str]) -> Mixed:
    adapters = []
    for reward, cell in cells.items():
        config = _adapter(run_dir, cell)
        parameters = load((run_dir / "cells" / cell / "adapter" / "parameters.safetensors").read_bytes())
        adapters.append((mix.weights[reward] * (config.alpha or config.rank) / config.rank, parameters))
    return mix_products(adapters, mix.rank)


def _made_of(run_dir: Path, grid: Grid, cells: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a seed's numbers depend on."""
    trained = {reward: _status(run_dir, cell)["training_hash"] for reward, cell in cells.items()}
    return {"cells": trained, "evaluation_hash": grid.cells[0].evaluation_hash}


def _existing(run_dir: Path, mix: Mix) -> tuple[Path, dict[str, Any]]:
    """Directory and record of the same mix, also where its weights were given in another order; else of a new one."""
    for path in sorted((run_dir / "mixes").glob("*/mix.json")):
        record = store.read_json(path)
        if (record["arm"], record["weights"], record["rank"]) == (mix.arm, dict(mix.weights), mix.rank):
            return path.parent, record
    return run_dir / "mixes" / mix.slug, {}


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in the workers, so that a mix does not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
