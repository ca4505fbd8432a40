"""Captions of a user's files, on their way into one file; a run that was stopped goes on.

Until all is done they stand beside it, in `.NAME.partial`: a line of settings, then a line of JSON
for every batch. A line that was cut off is a batch that is done again.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from openblip.data.sinks import is_temporary, whole_file, write_bytes_atomically

KINDS = (".jsonl", ".csv", ".parquet")
ROWS_PER_GROUP = 10_000
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("mean_log_probabilities", pa.list_(pa.float64())),
    ]
)

WORDS_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("flags", pa.list_(pa.list_(pa.string()))),
        ("words", pa.list_(pa.list_(pa.string()))),
        ("word_probabilities", pa.list_(pa.list_(pa.float64()))),
    ]
)

Row = Mapping[str, Any]
"""`path` with `captions`, each a `text` with its `mean_log_probability`, or with an `error`.

With words, a caption also has `flags`, and `words`, each a `text` with its `probability`.
"""


class CaptionRows:
    """The rows of a file `target`: .jsonl, .csv (a row per caption) or .parquet.

    What could not be captioned stands in a JSONL file as a row with `error`, and beside the other
    kinds in `NAME.failed.jsonl`.
    num_done  rows that an earlier run has written
    files     paths that are captioned, in their order
    skipped   paths that the first run left out
    """

    def __init__(
        self,
        target: Path,
        settings: Mapping[str, Any],
        files: Sequence[Path],
        skipped: set[Path],
        *,
        has_words: bool = False,
    ) -> None:
        """Start, or go on with what is there.

        has_words  the captions come with flags and words, which become columns of their own; in
                   CSV the flags and the probabilities have spaces between them
        files    all that was found; `target` and what stands beside it until then are left out
        skipped  of them those that the first run leaves out; the runs that go on do as it did
        Raises ValueError for another ending, if `target` exists, and if an earlier run had other
        settings or other files, or left something that is no beginning of one.
        """
        if target.suffix not in KINDS:
            raise ValueError(f"{target}: the name must end in {', '.join(KINDS)}")
        if target.exists():
            raise ValueError(f"{target} exists: remove it, or choose another name")
        self._has_words = has_words
        self._target, self._partial = target, target.with_name(f".{target.name}.partial")
        self._failed = target.with_name(f"{target.name}.failed.jsonl")
        own = {path.resolve() for path in (self._partial, self._failed)}
        found = [path for path in files if path.resolve() not in own]
        names = "\n".join(repr(str(path)) for path in found)
        told = {**settings, "files": hashlib.sha256(names.encode()).hexdigest()}
        self.num_done, self.skipped = 0, [path for path in found if path in skipped]
        if self._partial.exists():
            self._go_on(told, found)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            places = [place for place, path in enumerate(found) if path in skipped]
            head = {"settings": told, "skipped": places}
            write_bytes_atomically(self._partial, _line(head))
        left_out = set(self.skipped)
        self.files = [path for path in found if path not in left_out]

    def append(self, rows: Sequence[Row]) -> None:
        """Write a batch to disk."""
        with self._partial.open("ab") as file:
            file.write(_line(list(rows)))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the file; it appears whole, and what stood beside it goes."""
        if self._target.suffix != ".jsonl":
            failed = [row for row in self._rows() if "error" in row]
            if failed:
                write_bytes_atomically(self._failed, b"".join(map(_line, failed)))
        with whole_file(self._target) as temporary:
            match self._target.suffix:
                case ".jsonl":
                    with temporary.open("wb") as file:
                        file.writelines(map(_line, self._rows()))
                case ".csv":
                    self._write_csv(temporary)
                case _:
                    self._write_parquet(temporary)
        self._partial.unlink()

    def _go_on(self, settings: Mapping[str, Any], found: Sequence[Path]) -> None:
        try:
            with self._partial.open("rb+") as file:
                head = json.loads(file.readline())
                self._check_same(settings, head["settings"])
                self.skipped = [found[place] for place in head["skipped"]]
                end = file.tell()
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.num_done += len(json.loads(line))
                    end += len(line)
                file.truncate(end)
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self._partial} is damaged: {error!r}; remove it to begin anew"
            ) from error

    def _check_same(self, settings: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(settings))
        other = [n for n in sorted(wanted | theirs) if wanted.get(n) != theirs.get(n)]
        if not other:
            return
        advice = f"remove {self._partial} to begin anew"
        if other == ["files"]:
            raise ValueError(
                f"{self._partial} was begun with other files: some came or went since then. "
                f"Put them back, or {advice}"
            )
        told = ", ".join(f"{n} {theirs.get(n)!r}, now {wanted.get(n)!r}" for n in other)
        raise ValueError(
            f"{self._partial} was begun with other settings: {told}. Take those, or {advice}"
        )

    def _rows(self) -> Iterator[Row]:
        with self._partial.open("rb") as file:
            file.readline()
            for line in file:
                yield from json.loads(line)

    def _write_csv(self, path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            head = ["path", "caption", "mean_log_probability"]
            writer.writerow([*head, "flags", "word_probabilities"] if self._has_words else head)
            for row in self._rows():
                for one in row.get("captions", ()):
                    cells = [row["path"], one["text"], one["mean_log_probability"]]
                    if self._has_words:
                        probabilities = (f"{word['probability']:.6g}" for word in one["words"])
                        cells += [" ".join(one["flags"]), " ".join(probabilities)]
                    writer.writerow(cells)

    def _write_parquet(self, path: Path) -> None:
        schema = WORDS_SCHEMA if self._has_words else SCHEMA
        with pq.ParquetWriter(path, schema) as writer:
            group: list[dict[str, Any]] = []
            for row in self._rows():
                if "error" in row:
                    continue
                group.append(_columns(row, has_words=self._has_words))
                if len(group) == ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(group, schema))
                    group = []
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema))


def _columns(row: Row, *, has_words: bool) -> dict[str, Any]:
    captions = row["captions"]
    columns = {
        "path": row["path"],
        "captions": [one["text"] for one in captions],
        "mean_log_probabilities": [one["mean_log_probability"] for one in captions],
    }
    if has_words:
        columns["flags"] = [one["flags"] for one in captions]
        for name, part in (("words", "text"), ("word_probabilities", "probability")):
            columns[name] = [[word[part] for word in one["words"]] for one in captions]
    return columns


def sidecar_of(image: Path) -> Path:
    """Return where the captions beside an image stand: kohya's `.txt` of the same name."""
    return image.with_suffix(".txt")


def write_sidecar(image: Path, captions: Sequence[str]) -> None:
    """Write captions beside an image, one a line."""
    write_bytes_atomically(sidecar_of(image), ("\n".join(captions) + "\n").encode())


def without_leftovers(files: Sequence[Path]) -> list[Path]:
    """Return files without the `.txt` beside others of their name, and what a killed run left."""
    stems = {path.with_suffix("") for path in files if path.suffix != ".txt"}
    return [
        path
        for path in files
        if not is_temporary(path) and (path.suffix != ".txt" or path.with_suffix("") not in stems)
    ]


def check_sidecars_differ(files: Sequence[Path]) -> None:
    """Raise ValueError naming two files whose captions would stand in one `.txt`."""
    seen: dict[Path, Path] = {}
    for path in files:
        other = seen.setdefault(sidecar_of(path), path)
        if other != path:
            raise ValueError(f"{other} and {path} would share {sidecar_of(path)}: rename one")


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"
