"""Writing: files and folders that appear whole or not at all, and tar shards of samples.

The other kinds of files that samples are written to are in `data.writers`.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from openblip.data.rows import IMAGE_EXTENSIONS
from openblip.data.samples import Sample

FOLDER_MARK = ".openblip"
"""An empty file in a folder of `whole_folder`. Without it a folder is not ours to replace."""


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
        _flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_out_of_room(error: OSError) -> bool:
    """Say whether a disk or a quota is full."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on a clean exit it is on disk, and stands at `path`.

    A folder that an earlier call made is replaced. Half of one never stands under the name: until
    the new one is whole the old one does, then for a moment none, then the new one. A process that
    is killed leaves temporary folders (`is_temporary`) and nothing else.
    Raises ValueError if something else stands there: it is not ours to remove.
    """
    _check_replaceable(path)
    temporary = _temporary(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    _remove_folder(temporary)  # of a killed process of the same number
    temporary.mkdir(parents=True)
    try:
        yield temporary
        (temporary / FOLDER_MARK).touch()
        for folder, _, names in os.walk(temporary):
            for each in (*(Path(folder, name) for name in names), Path(folder)):
                _flush(each)
        _check_replaceable(path)
        if path.exists():
            _remove_folder(aside)
            path.rename(aside)
        try:
            temporary.rename(path)
        except BaseException:
            if aside.exists():
                aside.rename(path)
            raise
        _remove_folder(aside)
    finally:
        _remove_folder(temporary)


def is_temporary(path: Path) -> bool:
    """Say whether a name is one that a file or folder has before it is whole.

    A killed writer leaves such names.
    """
    return path.name.startswith(".") and path.suffix == ".tmp"


def write_json_atomically(path: str | Path, value: object) -> None:
    """Write a JSON file, indented, in the way of `write_bytes_atomically`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes_atomically(path, text.encode())


class SampleWriter(ABC):
    """A file or folder of samples, written one by one, as a context.

    It appears under its name on a clean exit alone. The same samples give the same bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(self._whole(self._path))
            self._open(temporary, stack)
            # What is open is closed before the whole is flushed and renamed.
            self._stack = stack.pop_all()
        return self

    def write(self, sample: Sample) -> None:
        """Append a sample.

        Raises ValueError for a key that is empty or has a dot, an extension that no reader takes
        for an image's, a meta field `captions`, and a meta that JSON cannot hold.
        """
        if "." in sample.key or not sample.key:
            raise ValueError(f"key {sample.key!r} must not be empty or contain a dot")
        if sample.image_extension not in IMAGE_EXTENSIONS:
            raise ValueError(
                f"sample {sample.key}: the image's extension is {sample.image_extension!r}; "
                f"it must be one of {', '.join(sorted(IMAGE_EXTENSIONS))}"
            )
        if "captions" in sample.meta:
            raise ValueError(f"sample {sample.key}: meta must not hold 'captions'")
        try:
            self._append(sample)
        except TypeError as error:
            raise ValueError(f"sample {sample.key} cannot be written: {error}") from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _whole(self, path: Path) -> contextlib.AbstractContextManager[Path]:
        return whole_file(path)

    @abstractmethod
    def _open(self, temporary: Path, stack: contextlib.ExitStack) -> None:
        """Begin to write to `temporary`; what is put on the stack is closed before the end."""

    @abstractmethod
    def _append(self, sample: Sample) -> None:
        """Write a sample that has been checked."""


class ShardWriter(SampleWriter):
    """A tar shard in the WebDataset layout: per sample its image and a .json with its captions."""

    def _open(self, temporary: Path, stack: contextlib.ExitStack) -> None:
        file = stack.enter_context(temporary.open("wb"))
        self._tar = stack.enter_context(
            tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        )

    def _append(self, sample: Sample) -> None:
        description = json_line(description_of(sample))
        self._add(f"{sample.key}.{sample.image_extension}", sample.image_bytes)
        self._add(f"{sample.key}.json", description)

    def _add(self, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        entry.mode = 0o644
        self._tar.addfile(entry, io.BytesIO(data))


def description_of(sample: Sample) -> dict[str, Any]:
    """Return what stands in the .json beside an image: its captions and its meta fields."""
    return {"captions": [c.to_json() for c in sample.captions], **sample.meta}


def json_line(value: object) -> bytes:
    """Encode as JSON, on one line, readable. Raises TypeError for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character, as in texts that were cut: it must be escaped
        return json.dumps(value).encode()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_replaceable(path: Path) -> None:
    is_own = path.is_dir() and not path.is_symlink()
    is_own = is_own and ((path / FOLDER_MARK).is_file() or not any(path.iterdir()))
    if os.path.lexists(path) and not is_own:
        raise ValueError(
            f"{path} exists and openblip did not write it (it holds no file {FOLDER_MARK}): "
            "remove it, or choose another name"
        )


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
