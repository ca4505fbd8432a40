"""Changes of an index: one writer at a time, every change whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from openblip.data.sinks import json_line, whole_folder, write_bytes_atomically
from openblip.search.index import (
    COLUMNS,
    EMBEDDINGS,
    INDEX_FILE,
    ROWS,
    SEGMENTS,
    STATES,
    Index,
    Segment,
    State,
    segment_checksum,
)

_LOCK = "writer.lock"
_COPIED_ROWS = 1 << 14

_Part = tuple[pa.Table, NDArray[np.float32], NDArray[np.float16] | None]


class IndexWriter:
    """The one process that changes an index, as a context.

    Raises ValueError if another one does, and for an index of another model.
    """

    def __init__(self, folder: Path, *, model: str, model_id: str, embedding_width: int) -> None:
        self.folder = folder
        self._new = State(uuid.uuid4().hex, model, model_id, embedding_width)
        self._stack = contextlib.ExitStack()

    @classmethod
    def of(cls, folder: Path) -> "IndexWriter":
        """Return the writer of an index that is there. Raises ValueError if there is none."""
        state = Index.open(folder).state
        return cls(
            folder, model=state.model, model_id=state.model_id,
            embedding_width=state.embedding_width,
        )  # fmt: skip

    def __enter__(self) -> "IndexWriter":
        _check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # The lock goes with the process, however it ends.
        lock = self._stack.enter_context((self.folder / _LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stack.close()
            raise ValueError(f"another process writes to {self.folder}; wait for it") from None
        if not (self.folder / INDEX_FILE).exists():
            self._commit(self._new)
        self.index = Index.open(self.folder)
        state = self.index.state
        if state.model_id != self._new.model_id:
            self._stack.close()
            raise ValueError(
                f"{self.folder} was made with the model {state.model} ({state.model_id}); "
                f"{self._new.model} ({self._new.model_id}) embeds images elsewhere"
            )
        self._remove_strangers()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add(
        self,
        rows: Sequence[Mapping[str, Any]],
        embeddings: Tensor,
        states: Tensor | None = None,
        *,
        replaced: Sequence[int] = (),
    ) -> None:
        """Add images, in one commit with the deletion of those that they replace.

        rows        values of `COLUMNS`; their keys are not in the index, but for those replaced
        embeddings  (number, E), unit norm
        states      (number, 1 + N, D), to be kept; None: they are not
        replaced    numbers of images
        """
        table = pa.Table.from_pylist(list(rows), schema=COLUMNS)
        vectors = embeddings.float().numpy()
        stored = None if states is None else states.half().numpy()
        segment = self._write(iter([(table, vectors, stored)]), len(rows))
        state = self.index.state
        self._commit(
            replace(
                state,
                segments=(*state.segments, segment),
                deleted=self._deleted_with(replaced),
            )
        )

    def delete(self, numbers: Sequence[int]) -> None:
        """Delete images; their room comes back with `compact`."""
        self._commit(replace(self.index.state, deleted=self._deleted_with(numbers)))

    def compact(self) -> None:
        """Write all that is left into one segment, and give the room of the others back.

        Where the image states of some images are stored, those are a segment of their own.
        """
        segments = self._copies(self.index, self.index.is_live)
        self._commit(replace(self.index.state, segments=segments))
        self._remove_strangers()

    def merge(self, other: Index) -> int:
        """Add the images of another index whose keys are not here; return how many.

        Raises ValueError if another model made it.
        """
        if other.model_id != self.index.model_id:
            raise ValueError(
                f"{other.folder} was made with {other.state.model} ({other.model_id}), and "
                f"{self.folder} with {self.index.state.model} ({self.index.model_id})"
            )
        known = self.index.known()
        keys = other.column("key").to_pylist()
        is_new = other.is_live & np.array([key not in known for key in keys], dtype=np.bool_)
        num_new = int(is_new.sum())
        if num_new:
            state = self.index.state
            copied = self._copies(other, is_new)
            self._commit(replace(state, segments=(*state.segments, *copied)))
        return num_new

    def _copies(self, index: Index, wanted: NDArray[np.bool_]) -> tuple[Segment, ...]:
        """Write the wanted images of an index as new segments: with their states, and without."""
        segments: list[Segment] = []
        for own in (wanted & ~index.with_states, wanted & index.with_states):
            if own.any():
                parts = index.parts(own, _COPIED_ROWS)
                segments.append(self._write(parts, int(own.sum()), num_more=len(segments)))
        return tuple(segments)

    def _write(self, parts: Iterator[_Part], num_rows: int, *, num_more: int = 0) -> Segment:
        """Write a segment of parts, none of which need fit the memory with the others.

        num_more  segments that were written for the same commit
        """
        used = [int(segment.name) for segment in self.index.state.segments]
        name = f"{max(used, default=0) + 1 + num_more:06d}"
        width = self.index.embedding_width
        with whole_folder(self.folder / SEGMENTS / name) as folder:
            shape = (num_rows, width)
            vectors = np.lib.format.open_memmap(folder / EMBEDDINGS, "w+", np.float32, shape)
            stored: np.memmap[Any, np.dtype[np.float16]] | None = None
            done = 0
            with pq.ParquetWriter(folder / ROWS, COLUMNS, compression="zstd") as file:
                for table, some, states in parts:
                    file.write_table(table)
                    vectors[done : done + len(some)] = some
                    if states is not None:
                        if stored is None:
                            shape = (num_rows, *states.shape[1:])
                            stored = np.lib.format.open_memmap(
                                folder / STATES, "w+", np.float16, shape
                            )
                        stored[done : done + len(some)] = states
                    done += len(some)
            assert done == num_rows
            vectors.flush()
            if stored is not None:
                stored.flush()
            del vectors, stored
            digest = segment_checksum(folder)
        return Segment(name, num_rows, digest)

    def _deleted_with(self, numbers: Sequence[int]) -> dict[str, list[int]]:
        deleted = {name: set(rows) for name, rows in (self.index.state.deleted or {}).items()}
        for name, rows in self.index.segment_rows(numbers).items():
            deleted.setdefault(name, set()).update(rows)
        return {name: sorted(rows) for name, rows in deleted.items()}

    def _commit(self, state: State) -> None:
        names = {segment.name for segment in state.segments}
        deleted = {name: rows for name, rows in (state.deleted or {}).items() if name in names}
        state = replace(state, generation=state.generation + 1, deleted=deleted)
        write_bytes_atomically(self.folder / INDEX_FILE, json_line(state.to_json()))
        if hasattr(self, "index"):
            self.index.refresh()

    def _remove_strangers(self) -> None:
        """Remove what a killed writer left, and segments that are part of the index no more."""
        names = {segment.name for segment in self.index.state.segments}
        folder = self.folder / SEGMENTS
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in names:
                shutil.rmtree(path)


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that holds something else than an index."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file; an index is a folder")
    if folder.is_dir() and not (folder / INDEX_FILE).exists():
        others = [name for name in os.listdir(folder) if name not in (_LOCK, SEGMENTS)]
        if others:
            raise ValueError(f"{folder} is no index and is not empty: it holds {others[0]}")
