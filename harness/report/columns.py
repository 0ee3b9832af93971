"""Tables of many cells as one: texts as codes of few values, rows in one order whatever the order in the files.

A full grid has millions of scores, and every row repeats its cell, prompt and reward: as texts they would take ten
times the memory, and every comparison of a column would read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

NUMBERS = {
    **dict.fromkeys(("seed", "iteration", "noise_id", "n", "step"), pa.int64()),
    **dict.fromkeys(("queries", "denoiser_rows", "train_seconds", "score", "value", "t", "guidance"), pa.float64()),
}


def read_tables(paths: Sequence[Path], columns: Sequence[str]) -> pd.DataFrame:
    """Rows of all files without copies of the same row, sorted by their content; texts are categories, sorted too."""
    texts = [name for name in columns if name not in NUMBERS]
    found = [_coded(pq.ParquetFile(path, read_dictionary=texts).read(columns=list(columns)), texts) for path in paths]
    found = [table for table in found if len(table)]
    if not found:
        return pd.DataFrame({column: pd.Series(dtype=object) for column in columns})
    frame = pa.concat_tables(found).unify_dictionaries().to_pandas(self_destruct=True)
    for name in texts:
        frame[name] = frame[name].cat.reorder_categories(sorted(frame[name].cat.categories))
    return _ordered(frame)


def _coded(table: pa.Table, texts: Sequence[str]) -> pa.Table:
    """The columns of one file in the same types as those of all others, texts by their place in a dictionary."""
    coded = pa.dictionary(pa.int32(), pa.string())
    for i, field in enumerate(table.schema):
        column = table.column(i)
        if field.name in texts and field.type != coded:
            plain = column.cast(field.type.value_type) if pa.types.is_dictionary(field.type) else column
            table = table.set_column(i, field.name, plain.cast(pa.string()).dictionary_encode())
        elif field.name not in texts and field.type != NUMBERS[field.name]:
            table = table.set_column(i, field.name, column.cast(NUMBERS[field.name]))
    return table.replace_schema_metadata()


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order of their columns, each once."""
    values = [_values(frame[name]) for name in frame.columns]
    order = np.lexsort(values[::-1])
    new = np.zeros(len(frame), dtype=bool)
    new[:1] = True
    for column in values:
        here = column[order]
        new[1:] |= (here[1:] != here[:-1]) & ~((here[1:] != here[1:]) & (here[:-1] != here[:-1]))  # NaN equals NaN here
    return frame.take(order[new]).reset_index(drop=True)


def _values(column: pd.Series) -> NDArray:
    """What a column sorts by: small codes sort fast."""
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return np.asarray(column)
    codes = np.asarray(column.cat.codes)
    return codes.astype(np.int16) if len(column.cat.categories) < 2**15 else codes


class Groups:
    """Rows of a table by the values of some of its columns, found without reading the others."""

    def __init__(self, table: pd.DataFrame, by: Sequence[str]) -> None:
        numbers = [_codes(table[name]) for name in by]
        group = _combined(numbers)
        order = np.argsort(group, kind="stable")
        self._table = table.take(order) if (np.diff(group) < 0).any() else table
        ordered = group[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
        heads = self._table.iloc[starts][list(by)]
        ends = [*starts[1:].tolist(), len(ordered)][: len(starts)]
        keys = [tuple(map(str, row)) for row in heads.itertuples(index=False, name=None)]
        self._places = {key: slice(start, end) for key, start, end in zip(keys, starts.tolist(), ends, strict=True)}

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """The combinations of values that occur."""
        return tuple(self._places)

    def rows(self, key: tuple[str, ...]) -> pd.DataFrame:
        """The rows with these values, in the order of the table; none where they do not occur."""
        return self._table.iloc[self._places.get(key, slice(0, 0))]


PAIR = ("split", "prompt_id", "noise_id", "reward")


def on_identical_pairs(tuned: pd.DataFrame, base: pd.DataFrame) -> NDArray[np.float64]:
    """For each row the base model's score of the same prompt and latent by the same reward; NaN where it has none.

    Of several such rows of the base the first one counts.
    """
    if not len(base):
        return np.full(len(tuned), np.nan)
    both = pd.concat([base[list(PAIR)], tuned[list(PAIR)]], ignore_index=True)
    pair = _combined([_codes(both[name]) for name in PAIR])
    first, places = np.unique(pair[: len(base)], return_index=True)
    found = np.minimum(np.searchsorted(first, pair[len(base) :]), len(first) - 1)
    scores = base["score"].to_numpy(dtype=np.float64)[places]
    return np.where(first[found] == pair[len(base) :], scores[found], np.nan)


def _codes(column: pd.Series) -> NDArray[np.int64]:
    """Numbers for the values of a column, in their order."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        return np.asarray(column.cat.codes, dtype=np.int64)
    return np.asarray(np.unique(np.asarray(column), return_inverse=True)[1], dtype=np.int64)


def _combined(codes: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """One number for each combination, ordered as the combinations are."""
    result = np.zeros(len(codes[0]), dtype=np.int64)
    for code in codes:
        result = result * (int(code.max(initial=0)) + 1) + code
    return result
