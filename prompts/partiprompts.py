"""The 1632 PartiPrompts (P2) with category and challenge, from your copy: --suite partiprompts=PartiPrompts.tsv."""

from __future__ import annotations

from harness.prompts import Prompt, PromptSuite
from prompts import _benchmarks

COUNT = 1632
COLUMNS = ("prompt", "category", "challenge", "note")
PARTIPROMPTS = _benchmarks.Benchmark(
    name="partiprompts",
    layout="PartiPrompts.tsv, with the columns Prompt, Category, Challenge and Note between tabs",
    where="https://github.com/google-research/parti",
    licence="Apache-2.0",
)


def suite(given: str | None) -> PromptSuite:
    """1632 prompts, held out, the categories in turn; labels `category`, `challenge`, and `note` where there is one.

    Ids are the rows of the file, and every row is kept. Quotation marks are part of the texts: the file encloses no
    field in them, and a reader that takes them for enclosing alters prompts.

    Args:
        given: Where the copy is, as `Benchmark.read` says.

    Raises:
        UserError: The copy is missing or holds something else.
    """
    contents = PARTIPROMPTS.read(given, lambda path: [path])
    ((path, content),) = contents.files.items()
    rows = PARTIPROMPTS.rows(path, content, "\t", quoted=False)
    if rows and not set(COLUMNS) <= rows[0].keys():
        raise PARTIPROMPTS.error(f"{path} has the columns {', '.join(rows[0])}")
    if len(rows) != COUNT:
        raise PARTIPROMPTS.error(f"{path} has {len(rows)} rows instead of {COUNT}")
    prompts = [
        Prompt(
            f"parti-{number:04}",
            PARTIPROMPTS.prompt_text(row["prompt"], f"{path}, row {number + 1}"),
            {label: row[label].strip() for label in COLUMNS[1:] if row[label].strip()},
        )
        for number, row in enumerate(rows, 1)
    ]
    return PromptSuite(
        name=PARTIPROMPTS.name,
        version=contents.version,
        training=(),
        validation=(),
        held_out=_benchmarks.balanced(prompts, "category"),
        licence=PARTIPROMPTS.licence,
    )
