"""Images by the place that they were indexed from: a file, a tar's member, a table's row."""

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from openblip.data.remote import RemoteError
from openblip.data.rows import BadSample
from openblip.data.shards import Shard
from openblip.data.sources import folder_images, read_builds, tar_images

MOST_SHARDS = 64
"""Tar shards and folders whose contents are remembered."""


@dataclass(frozen=True)
class Place:
    """Where an image lies.

    address   of its shard, or of the folder that it is a file of
    key       of its sample
    entry     of a table: its row, counted from 0
    checksum  `image_checksum` of its bytes; what has another is another image
    """

    address: str
    key: str
    entry: int
    checksum: str


def image_checksum(data: bytes) -> str:
    """Hash the bytes of an image."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class UnreadableImageError(ValueError):
    """An image is no longer where it was indexed, or is another one now."""


class Places:
    """Reads images from where they were indexed."""

    def __init__(self) -> None:
        self._members: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
        self._files: OrderedDict[str, dict[str, Path]] = OrderedDict()

    def read(self, place: Place) -> bytes:
        """Return the bytes of one image. Raises UnreadableImageError."""
        [(_, data)] = self.read_all([place])
        if data is None:
            raise UnreadableImageError(
                f"{place.key} is no longer in {place.address}, or has changed"
            )
        return data

    def read_all(self, places: Sequence[Place]) -> Iterator[tuple[int, bytes | None]]:
        """Yield number and bytes of each place, those of one shard together; None: unreadable."""
        by_address: dict[str, list[int]] = defaultdict(list)
        for number, place in enumerate(places):
            by_address[place.address].append(number)
        for address, numbers in by_address.items():
            own = {number: places[number] for number in numbers}
            try:
                found = self._read_shard(Shard.at(address), own)
            except (OSError, RemoteError, ValueError):
                # The shard is gone, or is another one now: its images are told as unreadable.
                found = {}
            for number in numbers:
                data = found.get(number)
                if data is not None and image_checksum(data) != places[number].checksum:
                    # Who remembers where it lay must look again.
                    self._members.pop(address, None)
                    data = None
                yield number, data

    def _read_shard(self, shard: Shard, places: dict[int, Place]) -> dict[int, bytes]:
        if not shard.is_remote and shard.path.is_dir():
            return self._read_files(shard.path, places)
        if shard.suffix == ".tar":
            return self._read_members(shard, places)
        return _read_rows(shard, places)

    def _read_files(self, folder: Path, places: dict[int, Place]) -> dict[int, bytes]:
        known = self._files.get(str(folder), {})
        if any(place.key not in known for place in places.values()):
            known = _remember(self._files, str(folder), folder_images(folder))
        found = {}
        for number, place in places.items():
            path = known.get(place.key)
            if path is not None and path.is_file():
                found[number] = path.read_bytes()
        return found

    def _read_members(self, shard: Shard, places: dict[int, Place]) -> dict[int, bytes]:
        found = {}
        with shard.opened() as path:
            known = self._members.get(shard.address)
            if known is None:
                known = _remember(self._members, shard.address, tar_images(path))
            with path.open("rb") as stream:
                for number, place in places.items():
                    if place.key in known:
                        start, length = known[place.key]
                        stream.seek(start)
                        found[number] = stream.read(length)
        return found


def _read_rows(shard: Shard, places: dict[int, Place]) -> dict[int, bytes]:
    """Read rows of a table in one pass, from the first that is wanted to the last."""
    wanted = {place.entry: number for number, place in places.items()}
    first, last = min(wanted), max(wanted)
    found = {}
    for entry, build in enumerate(read_builds(shard, first=first), first):
        if entry in wanted:
            sample = build("web")
            number = wanted[entry]
            if not isinstance(sample, BadSample) and sample.key == places[number].key:
                found[number] = sample.image_bytes
        if entry == last:
            break
    return found


V = TypeVar("V")


def _remember(known: OrderedDict[str, V], name: str, value: V) -> V:
    known[name] = value
    while len(known) > MOST_SHARDS:
        known.popitem(last=False)
    return value
