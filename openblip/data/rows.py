"""What an entry of a shard holds: files of one key, or a table's row, as a `Sample`.

A row has
- its image as a path beside the table or a URL (`image`, `file_name`, `filepath`, `path`), as bytes
  (`jpg`, `png`, `webp`, or `image` as the datasets library stores it) or as text (`image_base64`);
- its captions as `captions`, `caption` or `text`;
- its key as `key`, `image_id`, `img_id` or `id`, else its place in the table is taken.
Further fields are the sample's meta. A row with `image_extension`, as `data.writers` writes it, may
hold them all in one field `meta`, an object or the JSON text of one: there no name has a meaning.
"""

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from openblip.data.remote import RemoteAbsentError, RemoteError
from openblip.data.samples import Caption, CaptionSource, Sample
from openblip.data.shards import Shard

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"})

_PATH_FIELDS = ("image", "file_name", "filepath", "path")
_BYTES_FIELDS = ("jpg", "jpeg", "png", "webp", "image_bytes", "image")
_KEY_FIELDS = ("key", "image_id", "img_id", "id")


@dataclass(frozen=True)
class BadSample:
    """What cannot be used, and why."""

    key: str
    reason: str


class UnreachableImageError(RemoteError):
    """The image of a row could not be fetched; `key` names the row."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


Build = Callable[[CaptionSource], Sample | BadSample]
"""Makes what an entry of a shard holds; until it is called, nothing of it is parsed."""


def build_sample(key: str, parts: Mapping[str, bytes], source: CaptionSource) -> Sample | BadSample:
    """Build a sample from the files of one key, by extension: an image, `json` and `txt`."""
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
        given = [] if one is None else one if isinstance(one, list) else [one]
    if not isinstance(given, list):
        raise ValueError("'captions' must be a list")
    for caption in given:
        if not isinstance(caption, str | dict):
            raise ValueError("a caption must be a text or an object")
    return tuple(_read_caption(caption, source) for caption in given), meta


def _read_caption(value: str | dict[str, object], source: CaptionSource) -> Caption:
    """Read a caption; in a table's struct all fields are there, and `decoding` is a JSON text."""
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if each is not None}
        if isinstance(decoding := value.get("decoding"), str):
            value["decoding"] = json.loads(decoding)
    return Caption.from_json(value, source)


def read_row(shard: Shard, number: int, row: object, source: CaptionSource) -> Sample | BadSample:
    """Build a sample from the fields of a table's row, None where it is not one.

    number  place in the table, which names a row that has no key
    Raises UnreachableImageError if a remote image cannot be fetched; one that is absent makes a bad
    sample.
    """
    key = f"{shard.stem}_{number:08d}"
    try:
        captions, meta = _parse_fields(row, source)
    except ValueError:
        return BadSample(key, "bad_json" if shard.suffix == ".jsonl" else "bad_row")
    own_extension, own_meta = _take_own(meta)
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
                image = shard.read_beside(value)
                suffix = PurePosixPath(value).suffix[1:].lower()
                # Another, as of a URL with a query, would not be read back from a shard.
                extension = suffix if suffix in IMAGE_EXTENSIONS else extension
    except (OSError, RemoteAbsentError):
        return BadSample(key, "missing_image")
    except RemoteError as error:
        raise UnreachableImageError(key, str(error)) from error
    except binascii.Error:
        return BadSample(key, "bad_base64")
    if image is None:
        return BadSample(key, "missing_image")
    return Sample(key, image, captions, {**meta, **own_meta}, own_extension or extension)


def _take_own(meta: dict[str, object]) -> tuple[str | None, dict[str, object]]:
    """Take what `data.writers` adds out of a row: `image_extension`, and the packed `meta`."""
    extension = meta.get("image_extension")
    if not isinstance(extension, str) or extension not in IMAGE_EXTENSIONS:
        return None, {}
    del meta["image_extension"]
    packed = meta.get("meta")
    if isinstance(packed, str):
        try:
            packed = json.loads(packed)
        except ValueError:
            return extension, {}
    if not isinstance(packed, dict):
        return extension, {}
    del meta["meta"]
    return extension, packed
