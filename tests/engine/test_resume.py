"""The same command again does what is missing and nothing else; faults stay in their cells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from harness import cli, store
from harness.errors import CellsFailed, UserError
from tests.engine.fakes import Bench, assert_same_cell, assert_same_run, outcome, scores


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder with the time of its last change."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def cells(run: Path) -> list[str]:
    """The cells of a run besides the base."""
    return sorted(path.name for path in (run / "cells").iterdir() if path.name != "base")


def test_a_finished_run_is_left_alone(bench: Bench) -> None:
    """The same command again runs no cell and changes no record."""
    run = bench.run()
    before = tree(run / "cells")
    bench.run()
    assert bench.ran == []
    assert tree(run / "cells") == before


def test_a_seed_or_an_arm_adds_only_its_cells(bench: Bench) -> None:
    """Growing a run keeps what is there; the plan and the records are those of one bigger run."""
    run = bench.run(methods=["draft"])
    before = tree(run / "cells")
    bench.run(methods=["draft"], seeds=[0, 1])
    assert [name[-5:] for name in bench.ran] == ["seed1"]
    bench.run(methods=["draft", "ddpo"], seeds=[0, 1])
    assert [name[:4] for name in bench.ran] == ["ddpo", "ddpo"]
    assert before.items() <= tree(run / "cells").items()
    whole = bench.run("whole", methods=["draft", "ddpo"], seeds=[0, 1])
    assert_same_run(run, whole)
    plans = [store.read_json(path / "run.json") for path in (run, whole)]
    assert [plan["seeds"] for plan in plans] == [[0, 1], [0, 1]]
    assert [[arm["label"] for arm in plan["arms"]] for plan in plans] == [["draft", "ddpo"]] * 2


def test_asking_for_less_keeps_what_is_there(bench: Bench) -> None:
    """A smaller command in the same directory runs nothing and drops nothing from the plan."""
    run = bench.run(seeds=[0, 1], rewards=[bench.reward("Quadratic"), bench.reward("Fragile")])
    before = store.read_json(run / "run.json")
    bench.run(methods=["ddpo"])
    assert bench.ran == []
    after = store.read_json(run / "run.json")
    assert (after["seeds"], len(after["cells"])) == ([0, 1], len(before["cells"]))
    assert [reward["name"] for reward in after["rewards"]] == [reward["name"] for reward in before["rewards"]]


def test_probes_that_are_not_asked_for_any_more_are_kept(bench: Bench) -> None:
    """Further seeds may do without them; probes that old cells have not taken are refused with the difference."""
    run = bench.run(methods=["draft"], probes=["gradient-norms"])
    bench.run(methods=["draft"], seeds=[0, 1])
    (first, second) = cells(run)
    assert bench.ran == [second]
    taken = pd.read_parquet(run / "cells" / first / "probes.parquet")
    assert set(taken["point"]) == {"start", "middle", "end"}
    assert set(taken["quantity"]) == {"norm-latents", "norm-adapter", "norm-adapter-total"}
    with pytest.raises(UserError, match="probes"):
        bench.run(methods=["draft"], seeds=[0, 1], probes=["gradient-norms"])


@pytest.mark.parametrize("keep", ["final", "none"])
def test_a_new_reward_scores_and_does_not_train(bench: Bench, keep: str) -> None:
    """Old cells are scored by a reward that was added, from what they stored, as if it had been there at once."""
    names = [bench.reward("Quadratic"), bench.reward("Fragile")]
    run = bench.run(rewards=names[:1], methods=["draft"], keep_images=keep)
    (old,) = cells(run)
    trained = {
        path: time for path, time in tree(run / "cells").items() if path.endswith(("jsonl", "safetensors", "npz"))
    }
    bench.run(rewards=names, methods=["draft"], keep_images=keep)
    assert len(bench.ran) == 3
    assert trained.items() <= tree(run / "cells").items()
    whole = bench.run("whole", rewards=names, methods=["draft"], keep_images=keep)
    key = ["point", "split", "prompt_id", "noise_id", "reward"]
    for name in ("base", old):
        late, once = (scores(path / "cells" / name).set_index(key).sort_index() for path in (run, whole))
        final = once.loc[["final"]]
        pd.testing.assert_frame_equal(late.loc[["final"]], final, check_exact=True)
        assert late.index.is_unique
    bench.run(rewards=names, methods=["draft"], keep_images=keep)
    bench.run(rewards=names[:1], methods=["draft"], keep_images=keep)
    assert bench.ran == []


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"settings": {"draft": {"learning_rate": 0.5}}}, "learning_rate was 0.003 and is now 0.5"),
        ({"budget": {"amount": 18, "curve_points": [8]}}, "budget.amount was 16.0 and is now 18.0"),
        ({"sampler": {"steps": 5}}, "sampler.steps was 4 and is now 5"),
        ({"dtype": "float64"}, "dtype was 'float32' and is now 'float64'"),
    ],
)
def test_changed_settings_are_refused_with_the_difference(
    bench: Bench, change: dict[str, object], difference: str
) -> None:
    """One directory never mixes settings: the second command is refused, and nothing is touched."""
    run = bench.run(methods=["draft"])
    before = tree(run)
    with pytest.raises(UserError, match="other settings") as caught:
        bench.run(methods=["draft"], **change)
    assert difference in str(caught.value)
    assert tree(run) == before


def test_a_base_made_otherwise_is_refused_too(bench: Bench) -> None:
    """Where only the base was finished, other evaluation settings must not be measured against it."""
    run = bench.run(methods=["draft"])
    for file in (run / "cells" / cells(run)[0]).rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(UserError, match="holds base made with other settings"):
        bench.run(methods=["draft"], sampler={"steps": 5})


def test_one_process_at_a_time_owns_a_run(bench: Bench) -> None:
    """While another process holds the directory a run is refused, and says who holds it; afterwards it works."""
    program = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('pid 77', file=file, flush=True)\n"
        "print('mine', flush=True)\n"
        "input()\n"
    )
    (bench.folder / "run").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(bench.folder / "run" / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(UserError, match=r"another process \(pid 77\)"):
        bench.run()
    assert [path.name for path in (bench.folder / "run").iterdir()] == ["lock"]
    other.communicate("\n")
    bench.run(methods=["draft"])
    assert len(bench.ran) == 2


def test_a_diverged_cell_keeps_its_records_and_stops_nobody(bench: Bench) -> None:
    """A reward that stops being a number ends its cell with a reason and with scores; the run is a success."""
    rewards = [bench.reward("Brightness"), bench.reward("Quadratic")]
    run = bench.run(methods=["draft"], rewards=rewards, settings={"draft": {"learning_rate": 0.3}})
    states = {name: store.read_json(run / "cells" / name / "status.json") for name in cells(run)}
    (diverged,) = [name for name, status in states.items() if status["state"] == "diverged"]
    assert [status["state"] for name, status in states.items() if name != diverged] == ["completed"]
    reason, done = states[diverged]["reason"], states[diverged]["iterations"]
    assert "Brightness" in diverged
    assert f"(iteration {done + 1})" in reason
    assert 0 < done < 8
    frame = scores(run / "cells" / diverged)
    assert frame["score"].notna().all()
    assert set(frame[frame["point"] == "final"]["iteration"]) == {done}
    assert len((run / "cells" / diverged / "updates.jsonl").read_text(encoding="utf-8").splitlines()) == done
    bench.run(methods=["draft"], rewards=rewards, settings={"draft": {"learning_rate": 0.3}})
    assert bench.ran == []


def test_a_crash_is_reported_and_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that raises crashes its cell alone, with the traceback kept; the same command then completes it."""
    rewards = [bench.reward("Fragile"), bench.reward("Quadratic")]
    broken = bench.plugins.with_name("broken")
    broken.touch()
    with pytest.raises(CellsFailed, match="1 of 3 cells crashed"):
        bench.run(methods=["draft"], rewards=rewards)
    run = bench.folder / "run"
    (crashed,) = [name for name in cells(run) if "Fragile" in name]
    assert outcome(run / "cells" / crashed)["state"] == "crashed"
    assert outcome(run / "cells" / crashed)["reason"] == "RuntimeError: the scorer is out of order"
    assert "Traceback" in (run / "cells" / crashed / "error.txt").read_text(encoding="utf-8")
    assert len(bench.ran) == 3
    broken.unlink()
    bench.run(methods=["draft"], rewards=rewards)
    assert bench.ran == [crashed]
    assert not (run / "cells" / crashed / "error.txt").exists()
    whole = bench.run("whole", methods=["draft"], rewards=rewards)
    assert_same_cell(run / "cells" / crashed, whole / "cells" / crashed)


def test_exit_codes_tell_success_crash_and_divergence_apart(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A crashed cell is exit code 1 with a line that says where to look; a diverged cell is a result, code 0."""
    command = ["harness", "run", "--model", "gaussian", "--preset", "smoke", "--methods", "draft", "--seeds", "1"]

    def code(out: str, *more: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(bench.folder / out), *more])
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code
        return 0

    assert code("diverged", "--rewards", bench.reward("Brightness"), "--set", "draft.learning_rate=0.5") == 0
    assert "seed0 diverged" in capsys.readouterr().out
    bench.plugins.with_name("broken").touch()
    assert code("crashed", "--rewards", bench.reward("Fragile")) == 1
    printed = capsys.readouterr()
    assert "seed0 crashed" in printed.out.lower()
    assert "RuntimeError: the scorer is out of order" in printed.out
    assert printed.err.startswith("failed: 1 of 2 cells crashed")
    assert "error.txt" in printed.err
    assert code("dry", "--rewards", bench.reward("Quadratic"), "--dry-run") == 0
    assert "2 cells, 2 to run" in capsys.readouterr().out
    assert not (bench.folder / "dry").exists()
