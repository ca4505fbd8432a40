"""Reading tar files from start to end, several times as fast as the standard library's module.

A training reads every shard in every epoch, and for an image of a few kilobytes `tarfile` spends
more time on the header than on the rest. Formats: POSIX (ustar, pax) and GNU, as all tools write.
"""

import io
from collections.abc import Iterator
from typing import IO

BLOCK = 512
_FILE_KINDS = (b"0", b"\0", b"7")


class BrokenTarError(ValueError):
    """What is read is no tar file, or one that is damaged or cut off."""


def read_tar(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of all regular files.

    Raises BrokenTarError where the next header, or the file behind it, cannot be read.
    """
    for name, _, data in _members(stream, is_read=True):
        yield name, data


def tar_places(stream: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Yield path, first byte and length of all regular files, past their contents.

    Raises BrokenTarError where the next header cannot be read.
    """
    for name, length, _ in _members(stream, is_read=False):
        yield name, stream.tell() - length - (-length % BLOCK), length


def _members(stream: IO[bytes], *, is_read: bool) -> Iterator[tuple[str, int, bytes]]:
    """Yield path, length and content, or, unless it is read, a content of no bytes."""
    name, size = None, None  # what an extended header says of the file that follows it
    is_first = True
    while header := stream.read(BLOCK):
        if header.count(0) == len(header) == BLOCK:
            break
        given = _number(header[148:156]) if len(header) == BLOCK else -1
        # The checksum counts its own field as spaces.
        if given != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise BrokenTarError("no tar header" if is_first else "a broken header")
        is_first = False
        length = _number(header[124:136]) if size is None else size
        kind, padding, data = header[156:157], -length % BLOCK, b""
        if is_read or kind not in _FILE_KINDS:
            data = stream.read(length)
            if len(data) != length:
                raise BrokenTarError("the file ends within a member")
            is_cut = len(stream.read(padding)) != padding
        else:
            stream.seek(length + padding, io.SEEK_CUR)
            is_cut = False
        match kind:
            case b"L":
                name = _text(data)
            case b"x":
                name, size = _extended(data, name)
            case b"g" | b"K":
                pass
            case _:
                if kind in _FILE_KINDS:
                    yield name or _path(header), length, data
                name, size = None, None
        if is_cut:
            raise BrokenTarError("the file ends within a member")


def _path(header: bytes) -> str:
    name = _text(header[:100])
    is_posix = header[257:263] == b"ustar\0"
    prefix = _text(header[345:500]) if is_posix else ""
    return f"{prefix}/{name}" if prefix else name


def _extended(data: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Read pax records, each its length, a space, `key=value` and a line end."""
    size = None
    while data:
        length = int(data.partition(b" ")[0] or b"0")
        if not 0 < length <= len(data):
            raise BrokenTarError("a broken extended header")
        record, data = data[:length], data[length:]
        key, _, value = record.partition(b" ")[2].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "replace")
        elif key == b"size":
            size = int(value)
    return name, size


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def _number(data: bytes) -> int:
    """Read octal digits, or the binary number of GNU's large files."""
    if data[0] & 0x80:
        return int.from_bytes(data, "big") & ~(0x80 << 8 * (len(data) - 1))
    try:
        return int(data.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1
