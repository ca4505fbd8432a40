"""Tables of images: JSON lines, CSV, TSV and parquet, read from any place in a part of them.

Nothing of a row is parsed before it is wanted, and no more than some rows are held.
"""

import csv
import itertools
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from openblip.data.rows import BadSample, Build, read_row
from openblip.data.samples import CaptionSource, Sample
from openblip.data.shards import Shard

ROWS_AT_ONCE = 64
"""Rows of a parquet file that are in memory at a time."""


def jsonl_entries(
    shard: Shard, path: Path, part: int, num_parts: int, first: int
) -> Iterator[Build]:
    """Yield the lines that begin in one of several equal ranges of bytes, from the `first` on.

    A line without a key is named by the byte that it begins at.
    """
    return itertools.islice(_lines(shard, path, part, num_parts), first, None)


def _lines(shard: Shard, path: Path, part: int, num_parts: int) -> Iterator[Build]:
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        start, end = (num_bytes * place // num_parts for place in (part, part + 1))
        if start:
            # A line that begins at the very start of the range is its own.
            file.seek(start - 1)
            start += len(file.readline()) - 1
        while start < end and (line := file.readline()):
            if line.strip():
                yield partial(_read_line, shard, start, line)
            start += len(line)


def _read_line(shard: Shard, start: int, line: bytes, source: CaptionSource) -> Sample | BadSample:
    try:
        row = json.loads(line.decode("utf-8-sig", errors="replace"))
    except ValueError:
        row = None
    return read_row(shard, start, row, source)


def csv_entries(shard: Shard, path: Path, part: int, num_parts: int, first: int) -> Iterator[Build]:
    """Yield every `num_parts`-th row, from the `first` of them on; the first row names the columns.

    A line end may stand inside a cell, so that rows are found from the start of the file alone.
    """
    rows = _rows(shard, path)
    return itertools.islice(rows, part + first * num_parts, None, num_parts)


def _rows(shard: Shard, path: Path) -> Iterator[Build]:
    # A caption may be longer than what the module takes for a mistake.
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t" if shard.suffix == ".tsv" else ",")
        try:
            names = next(rows, [])
            for number, row in enumerate((row for row in rows if row), start=1):
                yield partial(_read_cells, shard, number, names, row)
        except csv.Error as error:
            raise ValueError(f"{shard}, line {rows.line_num}: {error}") from error


def _read_cells(
    shard: Shard, number: int, names: list[str], cells: list[str], source: CaptionSource
) -> Sample | BadSample:
    given = {name: cell for name, cell in zip(names, cells, strict=False) if name and cell}
    return read_row(shard, number, given, source)


def parquet_entries(
    shard: Shard, path: Path, part: int, num_parts: int, first: int
) -> Iterator[Build]:
    """Yield the rows of one of several equal ranges, from the `first` on.

    Row groups that lie wholly outside are not read. Raises ValueError for a broken file.
    """
    with _parquet_file(shard, path) as table:
        facts = table.metadata
        start, end = (facts.num_rows * place // num_parts for place in (part, part + 1))
        start += first
        behind = 0
        for group in range(facts.num_row_groups):
            begin, behind = behind, behind + facts.row_group(group).num_rows
            if behind <= start or begin >= end:
                continue
            number = begin
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=[group]):
                for index in range(max(start - number, 0), min(end - number, batch.num_rows)):
                    # The row itself is taken out of the table only if it is wanted.
                    yield partial(_read_row, shard, number + index + 1, batch.slice(index, 1))
                number += batch.num_rows
                if number >= end:
                    return


def num_rows(shard: Shard, path: Path) -> int:
    """Return the rows of a parquet file. Raises ValueError for a broken one."""
    with _parquet_file(shard, path) as table:
        return int(table.metadata.num_rows)


def _parquet_file(shard: Shard, path: Path) -> Any:
    # Slow to import, and few need it.
    from pyarrow import ArrowInvalid, parquet

    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"cannot read shard {shard}: {error}") from error


def _read_row(shard: Shard, number: int, batch: Any, source: CaptionSource) -> Sample | BadSample:
    [row] = batch.to_pylist()
    return read_row(shard, number, {k: v for k, v in row.items() if v is not None}, source)
