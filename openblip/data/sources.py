"""Reading: data sets as `Sample`s, from tar shards, image folders, tables and annotation files.

`data.rows` tells which fields of a table are understood, `data.caption_files` which JSON formats,
`data.shards` how data sets are addressed, and `data.remote` how remote ones are fetched.

What cannot be used is reported by key and reason, never raised and never lost silently. A shard
that cannot be read at all, or fetched, is raised: to go on without it would be to lose it.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from openblip.captions import clean_caption
from openblip.data.caption_files import json_entries
from openblip.data.remote import is_remote, list_remote
from openblip.data.rows import IMAGE_EXTENSIONS, BadSample, Build, build_sample
from openblip.data.samples import CaptionSource, Sample
from openblip.data.shards import Shard, expanded
from openblip.data.sinks import is_temporary
from openblip.data.tables import csv_entries, jsonl_entries, num_rows, parquet_entries
from openblip.data.tar import BrokenTarError, read_tar, tar_places

FILE_KINDS = (".tar", ".jsonl", ".csv", ".tsv", ".parquet", ".json")
FOLDER_KINDS = (".tar", ".parquet", ".jsonl")
"""Of the files in a folder those of the first kind that is there are its shards."""

_NOT_DATA = (".captions.jsonl", ".failed.jsonl", ".log.jsonl")
"""What CapFilt, `openblip caption` and trainings write beside their results."""

Address = str | Path | Shard
"""Of a data set or a shard: a path or a URL."""


@dataclass(frozen=True)
class WeightedData:
    """A data set that gives a share of all pairs: its weight over the sum of all weights."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of {self.path} is {self.weight}; it must be above 0")


Data = Address | WeightedData
"""A data set to train on. Where one has a weight, those without one have the weight 1."""


OnBad = Callable[[str, str], None]


def address_of(data: Data) -> Address:
    """Return where a data set is."""
    return data.path if isinstance(data, WeightedData) else data


def weights_of(data: Sequence[Data]) -> tuple[float, ...]:
    """Return the share of each data set in all pairs; nothing if none has a weight."""
    if not any(isinstance(each, WeightedData) for each in data):
        return ()
    weights = [each.weight if isinstance(each, WeightedData) else 1.0 for each in data]
    return tuple(weight / sum(weights) for weight in weights)


def check_data(data: Iterable[Data]) -> None:
    """Raise ValueError for the first that is no data set."""
    for each in data:
        list_shards(address_of(each))


def list_shards(address: Address) -> list[Shard]:
    """Return the units in which a data set is read.

    address  of a file of one of `FILE_KINDS`, several of them in braces, or a folder: of .tar or
             .parquet files, of images, or of .jsonl files if there is none of the others
    Raises ValueError for anything else, and for a remote folder that cannot be listed.
    """
    text = str(address)
    if "{" in text and (is_remote(text) or not Path(text).exists()):
        return [shard for each in expanded(text) for shard in list_shards(each)]
    shard = Shard.at(address)
    if shard.is_remote:
        return _list_remote(shard)
    path = shard.path
    if path.is_file() and path.suffix in FILE_KINDS:
        return [shard]
    if path.is_dir():
        for kind in FOLDER_KINDS:
            # Lines that lie among images may be about them, as datasets' metadata.jsonl is.
            if kind == ".jsonl" and next(_images(path), None):
                return [shard]
            if shards := sorted(file for file in path.glob(f"*{kind}") if _is_data(file.name)):
                return [Shard(str(file)) for file in shards]
    raise ValueError(
        f"{shard} is no data set: expected a {', '.join(FILE_KINDS)} file, a folder of .tar, "
        ".parquet or .jsonl files, or a folder of images"
    )


def _is_data(name: str) -> bool:
    return not name.endswith(_NOT_DATA)


def _list_remote(shard: Shard) -> list[Shard]:
    if shard.suffix in FILE_KINDS:
        return [shard]
    found = list_remote(shard.address, FOLDER_KINDS)
    for kind in FOLDER_KINDS:
        if shards := [Shard(each) for each in found if each.endswith(kind) and _is_data(each)]:
            return shards
    raise ValueError(
        f"{shard} is no data set: expected a {', '.join(FILE_KINDS)} file, or a folder of .tar, "
        ".parquet or .jsonl files; loose images are fetched too slowly to train on"
    )


def read_samples(
    shard: Address, *, default_source: CaptionSource = "web", on_bad: OnBad
) -> Iterator[Sample]:
    """Yield the samples of one shard in a fixed order.

    default_source  source of captions that do not state theirs
    on_bad          called with key and reason for each sample that cannot be used
    """
    for entry in read_part(shard, default_source=default_source):
        if isinstance(entry, BadSample):
            on_bad(entry.key, entry.reason)
        else:
            yield entry


def read_part(
    address: Address,
    part: int = 0,
    num_parts: int = 1,
    *,
    first: int = 0,
    default_source: CaptionSource = "web",
) -> Iterator[Sample | BadSample]:
    """Yield all that one of several parts of a shard holds, in a fixed order, good or bad.

    first  entry of the part that is wanted, counted from 0; those before it are passed over without
           a look at what they hold
    JSON lines and parquet are cut into ranges; of the others a part is every `num_parts`-th entry.
    """
    for build in read_builds(address, part, num_parts, first=first):
        yield build(default_source)


def read_builds(
    address: Address, part: int = 0, num_parts: int = 1, *, first: int = 0
) -> Iterator[Build]:
    """Yield what makes the entries that `read_part` yields, for threads to call.

    An image that lies beside a table is read, or fetched, by that call.
    """
    shard = Shard.at(address)
    with shard.opened() as path:
        yield from _entries(shard, path, part, num_parts, first)


def num_entries(address: Address) -> int:
    """Return how many entries a shard holds, good or bad; none of them is parsed."""
    shard = Shard.at(address)
    with shard.opened() as path:
        if shard.suffix == ".parquet" and path.is_file():
            return num_rows(shard, path)
        return sum(1 for _ in _entries(shard, path, 0, 1, 0))


def _entries(shard: Shard, path: Path, part: int, num_parts: int, first: int) -> Iterator[Build]:
    if path.is_dir():
        return _every(_folder_entries(path), part, num_parts, first)
    match shard.suffix:
        case ".jsonl":
            return jsonl_entries(shard, path, part, num_parts, first)
        case ".csv" | ".tsv":
            return csv_entries(shard, path, part, num_parts, first)
        case ".parquet":
            return parquet_entries(shard, path, part, num_parts, first)
        case ".json":
            return json_entries(shard, path, part, num_parts, first)
        case _:
            return _every(_tar_entries(shard, path), part, num_parts, first)


def _every(entries: Iterator[Build], part: int, num_parts: int, first: int) -> Iterator[Build]:
    return itertools.islice(entries, part + first * num_parts, None, num_parts)


def kept_texts(sample: Sample, max_words: int) -> Iterator[tuple[int, str]]:
    """Yield number and cleaned text of every caption that is for training."""
    for number, caption in enumerate(sample.captions):
        text = clean_caption(caption.text, max_words)
        if caption.drop_reason is None and text:
            yield number, text


def kept_captions(data: Iterable[Data], max_words: int = 50) -> Iterator[str]:
    """Yield the cleaned texts of all kept captions of data sets, for what needs no images.

    What cannot be used is passed over: it is counted where the images are read.
    """
    for each in data:
        for shard in list_shards(address_of(each)):
            for sample in read_samples(shard, on_bad=lambda key, reason: None):
                for _, text in kept_texts(sample, max_words):
                    yield text


def _tar_entries(shard: Shard, path: Path) -> Iterator[Build]:
    """Group consecutive files of one key, as WebDataset does."""
    key, parts = "", dict[str, bytes]()
    try:
        with path.open("rb") as stream:
            for name, data in read_tar(stream):
                new_key, extension = _key_and_extension(name)
                if new_key != key and parts:
                    yield partial(build_sample, key, parts)
                    parts = {}
                key = new_key
                parts[extension] = data
    except (BrokenTarError, OSError) as error:
        if isinstance(error, OSError) and not key:
            raise ValueError(f"cannot read shard {shard}: {error}") from error
        bad = BadSample(key or shard.name, "truncated_tar" if key else "unreadable_tar")
        yield lambda source: bad
        return
    if parts:
        yield partial(build_sample, key, parts)


def _key_and_extension(name: str) -> tuple[str, str]:
    """Take the path of a tar's file apart: the key ends at the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def tar_images(path: Path) -> dict[str, tuple[int, int]]:
    """Return where the image of each sample of a tar shard lies: first byte and length, by key.

    Only headers are read. Behind a broken one nothing is found. Raises OSError.
    """
    places: dict[str, tuple[int, int]] = {}
    with path.open("rb") as stream, contextlib.suppress(BrokenTarError):
        for name, start, length in tar_places(stream):
            key, extension = _key_and_extension(name)
            if extension in IMAGE_EXTENSIONS:
                places.setdefault(key.replace(".", "_"), (start, length))
    return places


def folder_images(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by the keys of their samples, in the samples' order."""
    return {_file_key(folder, path): path for path in sorted(_images(folder))}


def _folder_entries(folder: Path) -> Iterator[Build]:
    for path in sorted(_images(folder)):
        yield partial(_read_file, folder, path)


def _images(folder: Path) -> Iterator[Path]:
    """Yield the images of a folder, in no order, past what a killed writer left in it."""
    for where, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not is_temporary(Path(name))]
        yield from (path for name in names if _is_image(path := Path(where, name)))


def _file_key(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix().replace(".", "_")


def _read_file(folder: Path, path: Path, source: CaptionSource) -> Sample | BadSample:
    key = _file_key(folder, path)
    try:
        beside = {
            kind: path.with_suffix(f".{kind}").read_bytes()
            for kind in ("json", "txt")
            if path.with_suffix(f".{kind}").is_file()
        }
        image = path.read_bytes()
    except OSError:
        return BadSample(key, "unreadable_file")
    return build_sample(key, {path.suffix[1:].lower(): image} | beside, source)


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()
