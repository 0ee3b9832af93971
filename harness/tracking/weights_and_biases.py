"""Weights & Biases: one of its runs for each cell, in a group of the run's name, files below `<run>/wandb`."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import store
from harness.errors import UserError
from harness.tracking.tracker import Tracker

PROJECT = "draft-bench"
WITHOUT_SERVER = ("offline", "disabled", "dryrun")


def log_in() -> None:
    """Make sure that runs can be sent, unless WANDB_MODE says that they stay here.

    Raises:
        UserError: Nobody is logged in.
    """
    if os.environ.get("WANDB_MODE") in WITHOUT_SERVER:
        return
    import wandb

    try:
        known = wandb.login()
    except Exception as error:
        raise UserError(f"Weights & Biases: {error} To keep everything here, set WANDB_MODE=offline.") from error
    if not known:
        raise UserError("Weights & Biases: nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")


class WeightsAndBiases(Tracker):
    """Mode, entity and project come from W&B's own environment variables; the project is `draft-bench` otherwise.

    A cell keeps its id (`wandb/ids.json`) over interruptions. Sent to a server, its run is resumed, and steps that are
    there are not sent again; offline, the new directory replaces those that were not synchronised.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._folder = run_dir, run_dir / "wandb"
        self._runs: dict[str, Any] = {}

    def holds(self, cell: str) -> bool:
        """Whether the cell has an id."""
        return cell in self._ids()

    def _ids(self) -> dict[str, str]:
        return store.read_json(self._folder / "ids.json")

    def begin(self, cell: str, config: Mapping[str, Any]) -> None:
        """Start or resume its run."""
        import wandb

        ids = self._ids()
        if cell not in ids:
            ids[cell] = secrets.token_hex(6)
            store.write_json(self._folder / "ids.json", ids)
        for old in self._folder.glob(f"offline-run-*-{ids[cell]}"):
            if not any(old.glob("*.synced")):
                shutil.rmtree(old)
        self._runs[cell] = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(self._run_dir),
            group=str(config["run"]),
            name=cell,
            id=ids[cell],
            config=dict(config),
            resume="allow",
            reinit="create_new",  # several cells at once
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )

    def log(self, cell: str, step: int, metrics: Mapping[str, float]) -> None:
        """A row of its history; of a step that a server has from an earlier attempt only the summary is brought up."""
        run = self._runs[cell]
        if step < run.step:
            run.summary.update(dict(metrics))
        else:
            run.log(dict(metrics), step=step)

    def end(self, cell: str, state: str) -> None:
        """Finish its run; one that crashed is marked as failed."""
        run = self._runs.pop(cell)
        run.summary["state"] = state
        run.finish(exit_code=int(state in ("crashed", "interrupted")))
