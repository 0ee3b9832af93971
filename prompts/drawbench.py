"""The 200 prompts of DrawBench, from your copy: --suite drawbench=FILE."""

from __future__ import annotations

from pathlib import Path

from harness.prompts import Prompt, PromptSuite
from prompts import _benchmarks, _files

COUNT = 200
DRAWBENCH = _benchmarks.Benchmark(
    name="drawbench",
    layout="a .csv file with the columns Prompts and Category, or a .txt file with one prompt a line",
    where=(
        "https://imagen.research.google (a table to download as CSV), and as a list of lines in the repository "
        "NVlabs/DiffusionNFT, dataset/drawbench/test.txt"
    ),
    licence="no licence is stated",
)


def suite(given: str | None) -> PromptSuite:
    """200 prompts, held out; label `category` where the copy has it, the categories in turn.

    Copies repeat prompts (one that circulates has 999 lines): each text is taken once.

    Args:
        given: Where the copy is, as `Benchmark.read` says.

    Raises:
        UserError: The copy is missing or holds something else.
    """
    contents = DRAWBENCH.read(given, lambda path: [path])
    ((path, content),) = contents.files.items()
    found: dict[str, Prompt] = {}
    for place, raw, labels in _entries(path, content):
        text = DRAWBENCH.prompt_text(raw, f"{path}, {place}")
        found.setdefault(text, Prompt(_files.id_of(text), text, labels))
    if len(found) != COUNT:
        raise DRAWBENCH.error(f"{path} has {len(found)} different prompts instead of {COUNT}")
    return PromptSuite(
        name=DRAWBENCH.name,
        version=contents.version,
        training=(),
        validation=(),
        held_out=_benchmarks.balanced(list(found.values()), "category"),
        licence=DRAWBENCH.licence,
    )


def _entries(path: Path, content: bytes) -> list[tuple[str, str | None, dict[str, str]]]:
    """Place, text and labels of every line or row."""
    if path.suffix.lower() == ".txt":
        lines = enumerate(DRAWBENCH.text(path, content).split("\n"), 1)
        return [(f"line {number}", line, {}) for number, line in lines if line.strip()]
    rows = DRAWBENCH.rows(path, content, ",", quoted=True)
    if rows and not {"prompts", "category"} <= rows[0].keys():
        raise DRAWBENCH.error(f"{path} has the columns {', '.join(rows[0])}")
    return [(f"row {n}", row["prompts"], {"category": row["category"].strip()}) for n, row in enumerate(rows, 2)]
