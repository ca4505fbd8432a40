"""Where a stream stands, to the pair: saved with a training, and dealt anew to other ranks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Block:
    """Samples that are shuffled together: (unit, first sample, number of samples) each.

    place  pairs already taken, in the block's random order
    """

    ranges: tuple[tuple[int, int, int], ...]
    place: int = 0


@dataclass(frozen=True)
class Position:
    """Where one rank's stream stands, to the pair.

    blocks     to be finished, the current one first
    units      begun or left over, to be read next: (unit, samples of it already read)
    next_unit  the first that nobody has begun, of this rank
    num_ranks  the distance to the one after it
    num_units  of an epoch; 0 before the first batch
    num_seen   pairs taken so far, and samples that could not be read
    problems   how many of them could not be used, by reason
    sources    where each of several sources with weights stands; all else is then theirs
    num_taken  pairs that each of them has given since the ranks were dealt
    """

    blocks: tuple[Block, ...] = ()
    units: tuple[tuple[int, int], ...] = ()
    next_unit: int = 0
    num_ranks: int = 1
    num_units: int = 0
    num_seen: int = 0
    problems: Mapping[str, int] = field(default_factory=dict)
    sources: tuple["Position", ...] = ()
    num_taken: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads back."""
        return {
            "blocks": [
                {"ranges": [list(r) for r in b.ranges], "place": b.place} for b in self.blocks
            ],
            "units": [list(unit) for unit in self.units],
            "next_unit": self.next_unit,
            "num_ranks": self.num_ranks,
            "num_units": self.num_units,
            "num_seen": self.num_seen,
            "problems": dict(self.problems),
            "sources": [source.to_json() for source in self.sources],
            "num_taken": list(self.num_taken),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Position":
        """Read what `to_json` wrote."""
        return cls(
            tuple(
                Block(tuple((g, first, num) for g, first, num in block["ranges"]), block["place"])
                for block in value["blocks"]
            ),
            tuple((unit, num_read) for unit, num_read in value["units"]),
            value["next_unit"],
            value["num_ranks"],
            value["num_units"],
            value["num_seen"],
            dict(value["problems"]),
            tuple(cls.from_json(source) for source in value.get("sources", ())),
            tuple(value.get("num_taken", ())),
        )


def start_positions(num_ranks: int) -> list[Position]:
    """Return where each rank begins."""
    return [Position(next_unit=rank, num_ranks=num_ranks) for rank in range(num_ranks)]


def mixed(sources: Sequence[Position], num_taken: Sequence[int]) -> Position:
    """Return where a stream over several sources stands."""
    problems: Counter[str] = Counter()
    for source in sources:
        problems.update(source.problems)
    return Position(
        num_seen=sum(source.num_seen for source in sources),
        problems=dict(problems),
        sources=tuple(sources),
        num_taken=tuple(num_taken),
    )


def deal_anew(positions: Sequence[Position], num_ranks: int) -> list[Position]:
    """Return where each of another number of ranks goes on, so that every sample comes once.

    positions  of all ranks that there were, at one step
    """
    if len(positions) == num_ranks:
        return list(positions)
    if num_sources := len(positions[0].sources):
        dealt = [
            deal_anew([position.sources[source] for position in positions], num_ranks)
            for source in range(num_sources)
        ]
        return [mixed(each, (0,) * num_sources) for each in zip(*dealt, strict=True)]
    untouched = max(position.next_unit for position in positions)
    blocks = [block for position in positions for block in position.blocks]
    units = sorted(
        [unit for position in positions for unit in position.units]
        + [
            (unit, 0)
            for position in positions
            for unit in range(position.next_unit, untouched, position.num_ranks)
        ]
    )
    problems: Counter[str] = Counter()
    for position in positions:
        problems.update(position.problems)
    return [
        Position(
            blocks=tuple(blocks[rank::num_ranks]),
            units=tuple(units[rank::num_ranks]),
            next_unit=untouched + rank,
            num_ranks=num_ranks,
            num_units=positions[0].num_units,
            num_seen=sum(position.num_seen for position in positions) if rank == 0 else 0,
            problems=dict(problems) if rank == 0 else {},
        )
        for rank in range(num_ranks)
    ]
