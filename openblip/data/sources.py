"""Reading: tar shards, image folders and tables of images as `Sample`s.

Tables are JSONL, CSV, TSV, parquet (img2dataset's columns) and COCO's JSON of captions. A row has
- its image as a path beside the table (`image`, `file_name`, `filepath`, `path`), as bytes (`jpg`,
  `png`, `webp`, or `image` as the datasets library stores it) or as text (`image_base64`);
- its captions as `captions`, `caption` or `text`;
- its key as `key`, `image_id` or `id`, else its number is taken.
Further fields are the sample's meta.

What cannot be used is reported by key and reason, never raised and never lost silently.
"""

import base64
import binascii
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from openblip.captions import clean_caption
from openblip.data.samples import Caption, CaptionSource, Sample
from openblip.data.tar import BrokenTarError, read_tar

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})

ROWS_AT_ONCE = 64
"""Rows of a parquet file that are in memory at a time."""

FILE_KINDS = (".tar", ".jsonl", ".csv", ".tsv", ".parquet", ".json")
_PATH_FIELDS = ("image", "file_name", "filepath", "path")
_BYTES_FIELDS = ("jpg", "jpeg", "png", "webp", "image_bytes", "image")
_KEY_FIELDS = ("key", "image_id", "id")

OnBad = Callable[[str, str], None]


@dataclass(frozen=True)
class BadSample:
    """What cannot be used, and why."""

    key: str
    reason: str


Build = Callable[[CaptionSource], Sample | BadSample]
"""Makes what an entry of a shard holds; until it is called, nothing of it is parsed."""


def list_shards(path: str | Path) -> list[Path]:
    """Return the units in which a data set is read.

    path     a file of one of `FILE_KINDS`, a folder of .tar or .parquet files, or of images
    Raises ValueError for anything else.
    """
    path = Path(path)
    if path.is_file() and path.suffix in FILE_KINDS:
        return [path]
    if path.is_dir():
        for kind in (".tar", ".parquet"):
            if shards := sorted(path.glob(f"*{kind}")):
                return shards
        if any(_is_image(file) for file in path.rglob("*")):
            return [path]
    raise ValueError(
        f"{path} is no data set: expected a {', '.join(FILE_KINDS)} file, a folder of .tar or "
        ".parquet files, or a folder of images"
    )


def read_samples(
    shard: str | Path, *, default_source: CaptionSource = "web", on_bad: OnBad
) -> Iterator[Sample]:
    """Yield the samples of one shard in a fixed order.

    default_source  source of captions that do not state theirs
    on_bad          called with key and reason for each sample that cannot be used
    """
    for entry in read_entries(shard, default_source=default_source):
        if isinstance(entry, BadSample):
            on_bad(entry.key, entry.reason)
        else:
            yield entry


def read_entries(
    shard: str | Path, *, default_source: CaptionSource = "web", start: int = 0, step: int = 1
) -> Iterator[Sample | BadSample]:
    """Yield all that one shard holds in a fixed order, good or bad.

    start, step  the first entry, counted from 0, and every how manieth after it; the others are
                 passed over without a look at what they hold
    """
    shard = Path(shard)
    if shard.is_dir():
        entries = _folder_entries(shard)
    else:
        match shard.suffix:
            case ".jsonl":
                entries = _jsonl_entries(shard)
            case ".csv" | ".tsv":
                entries = _csv_entries(shard)
            case ".parquet":
                entries = _parquet_entries(shard)
            case ".json":
                entries = _coco_entries(shard)
            case _:
                entries = _tar_entries(shard)
    for build in itertools.islice(entries, start, None, step):
        yield build(default_source)


def kept_texts(sample: Sample, max_words: int) -> Iterator[tuple[int, str]]:
    """Yield number and cleaned text of every caption that is for training."""
    for number, caption in enumerate(sample.captions):
        text = clean_caption(caption.text, max_words)
        if caption.drop_reason is None and text:
            yield number, text


def kept_captions(data: Iterable[str | Path], max_words: int = 50) -> Iterator[str]:
    """Yield the cleaned texts of all kept captions of data sets, for what needs no images.

    What cannot be used is passed over: it is counted where the images are read.
    """
    for path in data:
        for shard in list_shards(path):
            for sample in read_samples(shard, on_bad=lambda key, reason: None):
                for _, text in kept_texts(sample, max_words):
                    yield text


def _tar_entries(shard: Path) -> Iterator[Build]:
    """Group consecutive files of one key, as WebDataset does: the key ends at the first dot."""
    key, parts = "", dict[str, bytes]()
    try:
        with shard.open("rb") as stream:
            for path, data in read_tar(stream):
                folder, _, name = path.rpartition("/")
                stem, _, extension = name.partition(".")
                new_key = f"{folder}/{stem}" if folder else stem
                if new_key != key and parts:
                    yield partial(_build, key, parts)
                    parts = {}
                key = new_key
                parts[extension.lower()] = data
    except (BrokenTarError, OSError) as error:
        if isinstance(error, OSError) and not key:
            raise ValueError(f"cannot read shard {shard}: {error}") from error
        bad = BadSample(key or shard.name, "truncated_tar" if key else "unreadable_tar")
        yield lambda source: bad
        return
    if parts:
        yield partial(_build, key, parts)


def _build(key: str, parts: Mapping[str, bytes], source: CaptionSource) -> Sample | BadSample:
    extension = next((name for name in parts if name in IMAGE_EXTENSIONS), None)
    if extension is None:
        return BadSample(key, "missing_image")
    try:
        captions, meta = _captions(parts.get("json"), parts.get("txt"), source)
    except ValueError:
        return BadSample(key, "bad_json")
    return Sample(key.replace(".", "_"), parts[extension], captions, meta, extension)


def _captions(
    json_bytes: bytes | None, text_bytes: bytes | None, source: CaptionSource
) -> tuple[tuple[Caption, ...], dict[str, object]]:
    captions: tuple[Caption, ...] = ()
    meta: dict[str, object] = {}
    if json_bytes is not None:
        captions, meta = _parse_fields(json.loads(json_bytes), source)
    if text_bytes is not None and not captions:
        text = text_bytes.decode("utf-8", errors="replace").strip()
        captions = (Caption(text, source),) if text else ()
    return captions, meta


def _parse_fields(
    value: object, source: CaptionSource
) -> tuple[tuple[Caption, ...], dict[str, object]]:
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    meta = dict(value)
    given = meta.pop("captions", None)
    if given is None:
        one = meta.pop("caption", None)
        if one is None:
            one = meta.pop("text", None)
        given = [] if one is None else [one]
    if not isinstance(given, list):
        raise ValueError("'captions' must be a list")
    for caption in given:
        if not isinstance(caption, str | dict):
            raise ValueError("a caption must be a text or an object")
    return tuple(Caption.from_json(caption, source) for caption in given), meta


def _folder_entries(folder: Path) -> Iterator[Build]:
    for path in sorted(file for file in folder.rglob("*") if _is_image(file)):
        yield partial(_read_file, folder, path)


def _read_file(folder: Path, path: Path, source: CaptionSource) -> Sample | BadSample:
    key = path.relative_to(folder).with_suffix("").as_posix().replace(".", "_")
    try:
        beside = {
            kind: path.with_suffix(f".{kind}").read_bytes()
            for kind in ("json", "txt")
            if path.with_suffix(f".{kind}").is_file()
        }
        image = path.read_bytes()
    except OSError:
        return BadSample(key, "unreadable_file")
    return _build(key, {path.suffix[1:].lower(): image} | beside, source)


def _jsonl_entries(shard: Path) -> Iterator[Build]:
    with shard.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield partial(_read_line, shard, number, line)


def _read_line(shard: Path, number: int, line: str, source: CaptionSource) -> Sample | BadSample:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    return _read_row(shard, number, row, source)


def _csv_entries(shard: Path) -> Iterator[Build]:
    """The first row names the columns."""
    # A caption may be longer than what the module takes for a mistake.
    csv.field_size_limit(1 << 24)
    with shard.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t" if shard.suffix == ".tsv" else ",")
        try:
            for number, row in enumerate(rows, start=1):
                given = {name: value for name, value in row.items() if name and value}
                yield partial(_read_row, shard, number, given)
        except csv.Error as error:
            raise ValueError(f"{shard}, line {rows.line_num}: {error}") from error


def _parquet_entries(shard: Path) -> Iterator[Build]:
    # Slow to import, and few need it.
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.ParquetFile(shard)
    except ArrowInvalid as error:
        raise ValueError(f"cannot read shard {shard}: {error}") from error
    number = 0
    with table:
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
            for index in range(batch.num_rows):
                number += 1
                # The row itself is taken out of the table only if it is wanted.
                yield partial(_read_parquet_row, shard, number, batch.slice(index, 1))


def _read_parquet_row(
    shard: Path, number: int, batch: Any, source: CaptionSource
) -> Sample | BadSample:
    [row] = batch.to_pylist()
    return _read_row(shard, number, {k: v for k, v in row.items() if v is not None}, source)


def _coco_entries(shard: Path) -> Iterator[Build]:
    """COCO's `images` and caption `annotations`: one sample an image, its captions human."""
    try:
        content = json.loads(shard.read_text(encoding="utf-8"))
        captions: dict[object, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        images = [(image["id"], image["file_name"]) for image in content["images"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{shard} is no caption file of COCO's kind: expected `images` with id and file_name, "
            f"and `annotations` with image_id and caption ({error!r})"
        ) from error
    for number, (key, name) in enumerate(images, start=1):
        row = {"key": str(key), "file_name": name, "captions": captions.get(key, [])}
        yield partial(_read_row, shard, number, row)


def _read_row(shard: Path, number: int, row: object, source: CaptionSource) -> Sample | BadSample:
    """Build a sample from the fields of a table's row, None where it is not one."""
    key = f"{shard.stem}_{number:08d}"
    try:
        captions, meta = _parse_fields(row, source)
    except ValueError:
        return BadSample(key, "bad_json" if shard.suffix == ".jsonl" else "bad_row")
    for name in _KEY_FIELDS:
        if name in meta:
            key = str(meta.pop(name)).replace(".", "_")
            break
    if meta.get("status", "success") != "success":  # img2dataset's word for a failed download
        return BadSample(key, "not_downloaded")
    image: bytes | None = None
    extension = "jpg"
    try:
        for name in _BYTES_FIELDS:
            value = meta.get(name)
            if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
                value = value["bytes"]
            if isinstance(value, bytes):
                image, extension = value, name if name in IMAGE_EXTENSIONS else extension
                del meta[name]
                break
        encoded = meta.pop("image_base64", None)
        if image is None and isinstance(encoded, str):
            image = base64.b64decode(encoded, validate=True)
        for name in _PATH_FIELDS:
            value = meta.get(name)
            if image is None and isinstance(value, str):
                del meta[name]
                path = shard.parent / value
                image, extension = path.read_bytes(), path.suffix[1:].lower() or extension
    except OSError:
        return BadSample(key, "missing_image")
    except binascii.Error:
        return BadSample(key, "bad_base64")
    if image is None:
        return BadSample(key, "missing_image")
    return Sample(key, image, captions, meta, extension)


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()
