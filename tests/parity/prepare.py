"""From nothing to the reference scores: builds the reference environment and runs it.

Standard library only; `tox -e parity` runs it:

    python prepare.py DIRECTORY            environment, random checkpoints, pictures and reference scores
    python prepare.py DIRECTORY --clean    removes the checkpoints (11 GB); the rest stays
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
NAMES = ("aesthetic", "imagereward", "pickscore", "hpsv2")


def main(directory: Path) -> None:
    """Make everything that the tests compare with."""
    python = build(directory / "environment")
    data = directory / "data"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "PYTHON", "VIRTUAL_ENV"))
    }
    environment |= {"HF_HOME": str(data.resolve() / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    run("checkpoints", [str(python), str(HERE / "make_checkpoints.py"), str(data)], environment)
    for name in NAMES:
        run(f"reference {name}", [str(python), str(HERE / "reference_scores.py"), str(data), name], environment)


def build(environment: Path) -> Path:
    """The Python of an environment with exactly the packages of reference.txt.

    Packages that disagree about each other's versions are installed without asking them: that this set works is shown
    by running it.
    """
    uv = shutil.which("uv")
    if uv is None:
        sys.exit("the reference environment is built by uv: pip install uv")
    variables = {name: value for name, value in os.environ.items() if name != "UV_CONSTRAINT"}
    python = environment / "bin" / "python"
    if not python.exists():
        run("uv venv", [uv, "venv", "--quiet", "--python", "3.11", str(environment)], variables)
    pins = str(HERE / "reference.txt")
    run("packages", [uv, "pip", "sync", "--quiet", "--python", str(python), pins], variables)
    (packages,) = environment.glob("lib/python3.11/site-packages")
    # hpsv2's wheel lacks the vocabulary that it reads when imported; open_clip ships the same.
    vocabulary = "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(packages / "open_clip" / vocabulary, packages / "hpsv2" / "src" / "open_clip" / vocabulary)
    return python


def run(what: str, command: list[str], environment: dict[str, str]) -> None:
    """Run a step, and say how long it took."""
    start = time.monotonic()
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{what}: failed with status {done.returncode}: {' '.join(command)}")
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def clean(data: Path) -> None:
    """Remove the checkpoints, which are large and made anew each time."""
    for folder in (*NAMES, "hub"):
        shutil.rmtree(data / folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[2:] == ["--clean"]:
        clean(Path(sys.argv[1]) / "data")
    else:
        main(Path(sys.argv[1]))
