"""Annotation files in JSON, in the formats that they are published in:

- a list of rows, as BLIP's own files of COCO, Flickr30k, Visual Genome, NoCaps and the web are;
- COCO's captions (`images`, `annotations`), NoCaps alike, and test sets without `annotations`;
- Karpathy's splits of COCO and Flickr30k (`images` with `sentences`): `dataset_coco.json#test`;
- Visual Genome's regions (a list with `regions`), whose phrases are captions of the whole image.

Images are found beside the file. A file is read piece by piece and never held, but for the captions
of COCO's kind: they are named by image, in any order, and are held once for all readers of a file.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from openblip.data.rows import BadSample, Build, read_row
from openblip.data.samples import CaptionSource, Sample
from openblip.data.shards import Shard

CHUNK_CHARACTERS = 1 << 18
_VISUAL_GENOME_FOLDERS = ("VG_100K", "VG_100K_2", ".")
_COCO_NAME = re.compile(r"COCO_[a-z]+\d{4}_(\d{12})$")
_IN_NUMBERS = "0123456789.eE+-"
_TRAINED_TOO = {"train": ("train", "restval")}
"""Karpathy's split of COCO calls part of what everybody trains on `restval`."""


def json_entries(
    shard: Shard, path: Path, part: int, num_parts: int, first: int
) -> Iterator[Build]:
    """Yield every `num_parts`-th sample of an annotation file, from the `first` of them on.

    Raises ValueError for a file of none of the formats, or a split that is not in it.
    """
    entries = _entries(shard, path)
    return itertools.islice(entries, part + first * num_parts, None, num_parts)


def _entries(shard: Shard, path: Path) -> Iterator[Build]:
    number = 0
    try:
        if _is_list(path):
            if shard.split:
                raise ValueError(f"{shard}: a list of rows is not divided into splits")
            for number, (_, row) in enumerate(json_elements(path), start=1):
                yield _listed(shard, number, row)
        else:
            rows = _images(shard, path)
            for number, row in enumerate(rows, start=1):
                yield partial(read_row, shard, number, row)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(_complaint(shard, repr(error))) from error
    if number == 0:
        raise ValueError(_complaint(shard, "it holds nothing"))


def _complaint(shard: Shard, reason: str) -> str:
    return (
        f"{shard} is no annotation file of a known kind: expected a list of rows with `image` and "
        "`caption`; `images` with id and file_name, and `annotations` with image_id and caption; "
        f"or Karpathy's `images` with `sentences` ({reason})"
    )


def _listed(shard: Shard, number: int, row: object) -> Build:
    if isinstance(row, dict) and isinstance(regions := row.get("regions"), list):
        phrases = [region["phrase"] for region in regions]
        return partial(_read_regions, shard, number, str(row["id"]), phrases)
    if isinstance(row, dict) and not {"key", "image_id", "img_id", "id"} & row.keys():
        # BLIP's evaluation takes the image's number out of its name, for COCO's server.
        name = PurePosixPath(str(row.get("image"))).stem
        if found := _COCO_NAME.search(name):
            row = {"key": str(int(found[1])), **row}
    return partial(read_row, shard, number, row)


def _read_regions(
    shard: Shard, number: int, key: str, phrases: list[str], source: CaptionSource
) -> Sample | BadSample:
    """Look for the image in the folders that it is published in."""
    for folder in _VISUAL_GENOME_FOLDERS:
        row = {"key": key, "image": f"{folder}/{key}.jpg", "captions": phrases}
        found = read_row(shard, number, row, source)
        if isinstance(found, Sample):
            break
    return found


def _images(shard: Shard, path: Path) -> Iterator[Mapping[str, object]]:
    """Yield the images of an annotation file with their captions, as rows."""
    captions: Mapping[object, list[str]] | None = None
    wanted = _TRAINED_TOO.get(shard.split, (shard.split,))
    splits: set[str] = set()
    num_wanted = 0
    for field, image in json_elements(path):
        if field != "images":
            continue
        if "sentences" in image:
            splits.add(image["split"])
            if not shard.split:
                raise ValueError(
                    f"{shard} holds several splits: choose one, as in {shard}#train (which takes "
                    "restval with it), #val or #test"
                )
            if image["split"] not in wanted:
                continue
            num_wanted += 1
            yield {
                "key": str(image.get("cocoid", image.get("imgid"))),
                "image": str(PurePosixPath(image.get("filepath", ""), image["filename"])),
                "captions": [sentence["raw"] for sentence in image["sentences"]],
            }
            continue
        if shard.split:
            raise ValueError(f"{shard}: the file is not divided into splits")
        if captions is None:
            captions = _captions_by_image(path, path.stat().st_mtime_ns)
        facts = {name: image[name] for name in ("domain", "open_images_id") if name in image}
        yield {
            "key": str(image["id"]),
            "image": image["file_name"],
            "captions": captions.get(image["id"], []),
            **facts,
        }
    if shard.split and not num_wanted:
        raise ValueError(f"{shard}: the splits are {', '.join(sorted(splits)) or 'none'}")


@functools.lru_cache(maxsize=1)
def _captions_by_image(path: Path, mtime_ns: int) -> Mapping[object, list[str]]:
    captions: dict[object, list[str]] = {}
    for field, annotation in json_elements(path):
        if field == "annotations":
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return captions


def _is_list(path: Path) -> bool:
    with path.open(encoding="utf-8-sig") as file:
        return _Text(file).next_character() == "["


def json_elements(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of the list that a JSON file holds, or of all lists in its object.

    Each comes with the field that the list stands in; one that is no list comes as it is. No more
    than an element is held. Raises json.JSONDecodeError, as the standard library does.
    """
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(file)
        if text.next_character() == "[":
            yield from (("", element) for element in text.elements())
            return
        text.expect("{")
        while text.next_character() != "}":
            field = text.value()
            text.expect(":")
            if text.next_character() == "[":
                yield from ((field, element) for element in text.elements())
            else:
                yield field, text.value()
            if text.next_character() != "}":
                text.expect(",")


class _Text:
    """The part of a text file that is being decoded."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._decoder = file, json.JSONDecoder()
        self._text, self._place = "", 0

    def next_character(self) -> str:
        """Return the next one that is no space, without taking it; empty at the end."""
        while True:
            while self._place < len(self._text):
                character = self._text[self._place]
                if not character.isspace():
                    return character
                self._place += 1
            if not self._read_on():
                return ""

    def expect(self, character: str) -> None:
        if self.next_character() != character:
            raise json.JSONDecodeError(f"expected {character!r}", self._text, self._place)
        self._place += 1

    def elements(self) -> Iterator[Any]:
        self.expect("[")
        if self.next_character() != "]":
            yield self.value()
            while self.next_character() != "]":
                self.expect(",")
                yield self.value()
        self.expect("]")

    def value(self) -> Any:
        """Take one value, reading on until it is whole."""
        self.next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if not self._read_on():
                    raise
                continue
            # A number may go on: its beginning is one too.
            behind = self._text[end : end + 1]
            if (behind and behind not in _IN_NUMBERS) or not self._read_on():
                self._place = end
                return value

    def _read_on(self) -> bool:
        """Read at least as much again as is left, so that long values are not begun too often."""
        left = self._text[self._place :]
        more = self._file.read(max(CHUNK_CHARACTERS, len(left)))
        self._text, self._place = left + more, 0
        return bool(more)
