"""Reading: tar shards, image folders and JSONL files as `Sample`s.

What cannot be used is reported by key and reason, never raised and never lost silently.
"""

import base64
import binascii
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from openblip.captions import clean_caption
from openblip.data.samples import Caption, CaptionSource, Sample

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})

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

    path     a .tar or .jsonl file, a folder of .tar files, or a folder of images
    Raises ValueError for anything else.
    """
    path = Path(path)
    if path.is_file() and path.suffix in {".tar", ".jsonl"}:
        return [path]
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if tars:
            return tars
        if any(_is_image(file) for file in path.rglob("*")):
            return [path]
    raise ValueError(
        f"{path} is no data set: expected a .tar or .jsonl file, a folder of .tar files, "
        "or a folder of images"
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
    elif shard.suffix == ".jsonl":
        entries = _jsonl_entries(shard)
    else:
        entries = _tar_entries(shard)
    for build in itertools.islice(entries, start, None, step):
        yield build(default_source)


def kept_captions(shards: Iterable[str | Path], max_words: int = 50) -> Iterator[str]:
    """Yield the cleaned texts of all kept captions, for what needs no images.

    What cannot be used is passed over: it is counted where the images are read.
    """
    for shard in shards:
        for sample in read_samples(shard, on_bad=lambda key, reason: None):
            for caption in sample.captions:
                text = clean_caption(caption.text, max_words)
                if caption.drop_reason is None and text:
                    yield text


def _tar_entries(shard: Path) -> Iterator[Build]:
    """Group consecutive files of one key, as WebDataset does: the key ends at the first dot."""
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(shard, mode="r|*") as tar:
            for entry in tar:
                if not entry.isfile():
                    continue
                folder, _, name = entry.name.rpartition("/")
                stem, _, extension = name.partition(".")
                new_key = f"{folder}/{stem}" if folder else stem
                file = tar.extractfile(entry)
                assert file is not None
                data = file.read()
                if new_key != key and parts:
                    yield partial(_build, key, parts)
                    parts = {}
                key = new_key
                parts[extension.lower()] = data
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, tarfile.TarError) and not key:
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
    key = f"{shard.stem}_{number:08d}"
    try:
        captions, meta = _parse_fields(json.loads(line), source)
    except ValueError:
        return BadSample(key, "bad_json")
    key = str(meta.pop("key", key)).replace(".", "_")
    path, encoded = meta.pop("image", None), meta.pop("image_base64", None)
    try:
        if isinstance(path, str):
            image = (shard.parent / path).read_bytes()
            extension = Path(path).suffix[1:].lower() or "jpg"
        elif isinstance(encoded, str):
            image, extension = base64.b64decode(encoded, validate=True), "jpg"
        else:
            return BadSample(key, "missing_image")
    except OSError:
        return BadSample(key, "missing_image")
    except binascii.Error:
        return BadSample(key, "bad_base64")
    return Sample(key, image, captions, meta, extension)


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()
