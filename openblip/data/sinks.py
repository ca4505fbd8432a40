"""Writing: files that appear whole or not at all, and tar shards of samples."""

import contextlib
import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from openblip.data.samples import Sample


def write_bytes_atomically(path: str | Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it."""
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write a file to; on a clean exit it is on disk, and renamed."""
    temporary = _temporary(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_out_of_room(error: OSError) -> bool:
    """Say whether a disk or a quota is full."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


def is_temporary(path: Path) -> bool:
    """Say whether a name is one that a file has before it is whole, as a killed writer leaves."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def write_json_atomically(path: str | Path, value: object) -> None:
    """Write a JSON file, indented, in the way of `write_bytes_atomically`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes_atomically(path, text.encode())


class ShardWriter:
    """A tar shard in the WebDataset layout: per sample its image and a .json with its captions.

    The file appears under its name on a clean exit alone. The same samples give the same bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._temporary = _temporary(self._path)

    def __enter__(self) -> "ShardWriter":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self

    def write(self, sample: Sample) -> None:
        """Append a sample. Raises ValueError for a key with a dot or a meta field `captions`."""
        if "." in sample.key or not sample.key:
            raise ValueError(f"key {sample.key!r} must not be empty or contain a dot")
        if "captions" in sample.meta:
            raise ValueError(f"sample {sample.key}: meta must not hold 'captions'")
        description = {"captions": [c.to_json() for c in sample.captions], **sample.meta}
        self._add(f"{sample.key}.{sample.image_extension}", sample.image_bytes)
        self._add(f"{sample.key}.json", json.dumps(description, ensure_ascii=False).encode())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                self._temporary.replace(self._path)
        finally:
            self._temporary.unlink(missing_ok=True)

    def _add(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        entry.mode = 0o644
        self._tar.addfile(entry, io.BytesIO(data))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
