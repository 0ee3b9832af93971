"""Writing figures and their numbers; those of a large run in a second process, while the rest is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from harness.report.captions import Drawn
from harness.report.style import drawing, write_figure

LARGE = 200  # cells: a process takes more to start than a smaller report would save


@contextmanager
def figure_writer(folder: Path, *, beside: bool) -> Iterator[Callable[[Drawn], None]]:
    """What writes a figure that is drawn, and its CSV, into the folder; all are there when the context ends.

    Args:
        folder: Where to.
        beside: Write in a second process, the same bytes; a script that calls this needs the usual guard of its main
            module (``if __name__ == "__main__"``), since the process is spawned.
    """
    if not beside:
        yield lambda drawn: _write(drawn.figure, drawn.data, folder / drawn.name, drawn.vector)
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        asked: list[Future[None]] = []

        def ask(drawn: Drawn) -> None:
            asked.append(pool.submit(_write_alone, drawn.figure, drawn.data, folder / drawn.name, drawn.vector))

        yield ask
        for future in asked:
            future.result()


def _write_alone(figure: Figure, data: pd.DataFrame, path: Path, vector: bool) -> None:
    """In a process of its own, which has no settings yet."""
    with drawing():
        _write(figure, data, path, vector)


def _write(figure: Figure, data: pd.DataFrame, path: Path, vector: bool) -> None:
    write_figure(figure, path, vector=vector)
    write_csv(data, path.with_name(f"{path.name}.csv"))


def write_csv(data: pd.DataFrame, path: Path) -> None:
    """The same bytes for the same numbers."""
    data.to_csv(path, index=False, lineterminator="\n")
