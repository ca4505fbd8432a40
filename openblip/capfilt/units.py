"""The units that CapFilt works in: shards, and parts of those that are too large for one.

The same data give the same units with the same names, whoever counts them.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from openblip.data.remote import RemoteAbsentError
from openblip.data.rows import Build
from openblip.data.samples import Sample
from openblip.data.shards import Shard, checksum
from openblip.data.sources import Address, list_shards, num_entries, read_builds, read_part


@dataclass(frozen=True)
class Unit:
    """One part of several of a shard; its name is that of its files in the output folder."""

    name: str
    shard: Shard
    part: int = 0
    num_parts: int = 1

    def __str__(self) -> str:
        more = f", part {self.part + 1} of {self.num_parts}" if self.num_parts > 1 else ""
        return f"{self.shard}{more}"

    def builds(self) -> Iterator[Build]:
        """Yield what makes all that the unit holds, good or bad, in a fixed order."""
        return read_builds(self.shard, self.part, self.num_parts)

    def samples(self) -> Iterator[Sample]:
        """Yield the samples that can be read, in the same order."""
        for entry in read_part(self.shard, self.part, self.num_parts):
            if isinstance(entry, Sample):
                yield entry


@dataclass(frozen=True)
class Snapshot:
    """A unit as it was before it was read."""

    unit: Unit
    checksum: str
    stamp: tuple[int, int] | None

    @classmethod
    def of(cls, unit: Unit) -> "Snapshot":
        """Take one. Raises FileNotFoundError or RemoteError if the shard is not there."""
        return cls(unit, checksum_of(unit.shard), stamp_of(unit.shard))

    @classmethod
    def if_there(cls, unit: Unit) -> "Snapshot | None":
        """Take one, None if the shard is not there."""
        try:
            return cls.of(unit)
        except (FileNotFoundError, RemoteAbsentError):
            return None

    def check(self) -> None:
        """Raise ValueError if the shard has changed since."""
        if self.stamp != stamp_of(self.unit.shard):
            raise ValueError(f"{self.unit.shard} was changed while it was read: run it once more")


def whole(address: Address) -> Unit:
    """Return a shard as one unit."""
    shard = Shard.at(address)
    return Unit(shard.stem, shard)


def list_units(address: Address, *, most_samples: int, most_bytes: int) -> list[Unit]:
    """Return the units of a data set.

    most_samples  of a unit of a table, of annotations or of a folder
    most_bytes    of a unit of a tar shard; remote shards are not cut, as their size is not known
    Raises ValueError as `list_shards` does.
    """
    shards = list_shards(address)
    repeated = {stem for stem, times in Counter(s.stem for s in shards).items() if times > 1}
    units = []
    for shard in shards:
        name = shard.stem
        if name in repeated:  # of several folders
            name += "-" + hashlib.blake2b(str(shard).encode(), digest_size=4).hexdigest()
        num_parts = _num_parts(shard, most_samples, most_bytes)
        if num_parts == 1:
            units.append(Unit(name, shard))
        else:
            units += [
                Unit(f"{name}_{part:05d}-of-{num_parts:05d}", shard, part, num_parts)
                for part in range(num_parts)
            ]
    return units


def _num_parts(shard: Shard, most_samples: int, most_bytes: int) -> int:
    if shard.is_remote:
        return 1
    if shard.suffix == ".tar" and shard.path.is_file():
        return max(1, -(-shard.path.stat().st_size // most_bytes))
    try:
        return max(1, -(-num_entries(shard) // most_samples))
    except ValueError:  # one broken shard of many is named when its unit fails
        return 1


def stamp_of(shard: Shard) -> tuple[int, int] | None:
    """Return size and time of change of a local file; None where they tell nothing."""
    if shard.is_remote or not shard.path.is_file():
        return None
    facts = shard.path.stat()
    return facts.st_size, facts.st_mtime_ns


def checksum_of(shard: Shard) -> str:
    """Return the hash of a shard's bytes; of a folder, of its files' names and sizes."""
    stamp = stamp_of(shard)
    # Without a stamp nobody knows whether it has changed.
    return _checksum(shard) if stamp is None else _checksum_at(shard, stamp)


@lru_cache(maxsize=64)  # the parts of a shard follow each other
def _checksum_at(shard: Shard, stamp: tuple[int, int]) -> str:
    return _checksum(shard)


def _checksum(shard: Shard) -> str:
    with shard.opened() as path:
        if not path.is_dir():
            return checksum(path)
        digest = hashlib.blake2b(digest_size=16)
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\n".encode())
        return digest.hexdigest()
