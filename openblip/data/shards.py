"""Where data lie: a data set's address, and the files that it is read from one by one.

An address is a path or a URL. `{0..9}`, `{000..099}` and `{train,test}` in it stand for several, as
WebDataset's users write them; `#name` behind an annotation file picks one of its splits.
"""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from openblip.data.remote import is_remote, local_copy, read_remote

_CHUNK_BYTES = 1 << 20
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class Shard:
    """A file, or a folder of images, that is read from start to end.

    address  path or URL
    split    of the annotations in it; empty: all of them
    """

    address: str
    split: str = ""

    @classmethod
    def at(cls, address: "str | Path | Shard") -> "Shard":
        """Return the shard at an address."""
        if isinstance(address, Shard):
            return address
        text = str(address)
        file, mark, split = text.rpartition("#")
        shard = cls(file, split)
        if mark and shard.suffix == ".json" and (shard.is_remote or not Path(text).exists()):
            return shard
        return cls(text)

    def __str__(self) -> str:
        return f"{self.address}#{self.split}" if self.split else self.address

    @property
    def is_remote(self) -> bool:
        return is_remote(self.address)

    @property
    def name(self) -> str:
        """The last part of the address."""
        path = urlsplit(self.address).path if self.is_remote else Path(self.address).as_posix()
        return PurePosixPath(path).name

    @property
    def stem(self) -> str:
        """The name without its last extension, with the split if there is one."""
        stem = PurePosixPath(self.name).stem
        return f"{stem}_{self.split}" if self.split else stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def num_bytes(self) -> int | None:
        """The size of a local file; of a remote one it is not known before it is fetched."""
        return None if self.is_remote else self.path.stat().st_size

    def absolute(self) -> "Shard":
        """Return the same with an address that holds in any working folder."""
        return self if self.is_remote else Shard(str(self.path.absolute()), self.split)

    @property
    def path(self) -> Path:
        """The path of a local one."""
        assert not self.is_remote, self.address
        return Path(self.address)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Path]:
        """Give a local file or folder with the content, for as long as the context is open.

        Raises RemoteError if it cannot be fetched.
        """
        if self.is_remote:
            with local_copy(self.address) as path:
                yield path
        else:
            yield self.path

    def read_beside(self, name: str) -> bytes:
        """Read a file that is named in this one: relative to its folder, or by its own address.

        Raises OSError, or RemoteError for one that cannot be fetched.
        """
        if is_remote(name):
            return read_remote(name)
        if self.is_remote:
            return read_remote(_join(self.address, name))
        return (self.path.parent / name).read_bytes()


def expanded(address: str) -> list[str]:
    """Return the addresses that braces stand for, in their order.

    Raises ValueError for a range that ends before it starts.
    """
    parts: list[Iterable[str]] = []
    end = 0
    for braces in _BRACES.finditer(address):
        parts.append([address[end : braces.start()]])
        parts.append(_choices(address, braces[1]))
        end = braces.end()
    parts.append([address[end:]])
    return ["".join(choice) for choice in itertools.product(*parts)]


def checksum(path: Path) -> str:
    """Hash a file, or the names and contents of all files of a folder."""
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _choices(address: str, text: str) -> list[str]:
    bounds = _RANGE.fullmatch(text)
    if bounds is None:
        # A single word in braces is not WebDataset's either.
        return text.split(",") if "," in text else ["{" + text + "}"]
    first, last = bounds[1], bounds[2]
    if int(first) > int(last):
        raise ValueError(f"{address}: the range {{{text}}} ends before it starts")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _join(address: str, name: str) -> str:
    folder = address.partition("?")[0].rpartition("/")[0]
    return f"{folder}/{quote(name) if address.startswith('http') else name}"
