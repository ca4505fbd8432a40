"""Sentences about two images: NLVR2's public files, and the stream that its models are trained on.

A data set is a JSONL file, or a JSON list as the released BLIP code reads, of rows with
- `sentence`, and `label`: true or false, or these as text; no label where it is not known;
- `images`: two paths beside the file; or else NLVR2's `identifier` (and `directory`), from which
  follow the names of its images, sought beside the file and in folders named as the split.

Letters: B pairs, L tokens, S image side in pixels.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from openblip.captions import clean_caption, has_left_or_right
from openblip.data.rows import BadSample
from openblip.data.samples import Sample
from openblip.data.shards import Shard
from openblip.data.sources import Data
from openblip.data.stream import SampleStream, StreamOptions
from openblip.images import ImageDecodeError, TrainTransform, decode_image
from openblip.tokenizer import Tokenizer

_OTHER_SIDE = {"left": "right", "right": "left"}


@dataclass(frozen=True)
class NlvrPair:
    """A sentence, cleaned, about two images.

    label      whether it is true; None: not known
    images     per image the paths where it may lie
    """

    identifier: str
    sentence: str
    label: bool | None
    images: tuple[tuple[Path, ...], tuple[Path, ...]]

    def swapped(self) -> "NlvrPair":
        """Return the images in the other order; the words left and right follow them.

        Source: BLIP's nlvr_dataset.py.
        """
        words = [_OTHER_SIDE.get(word, word) for word in self.sentence.split(" ")]
        return replace(self, sentence=" ".join(words), images=(self.images[1], self.images[0]))

    def read_images(self) -> tuple[bytes, bytes]:
        """Return the files' content. Raises ImageDecodeError for one that is not there."""
        first, second = (_read(paths) for paths in self.images)
        return first, second


def read_rows(path: Path, *, start: int = 0, step: int = 1) -> Iterator[Sample | BadSample]:
    """Yield rows of a file as samples without an image, for `read_pair`.

    start, step  the first row, counted from 0, and every how manieth after it
    Raises ValueError for a file of another kind.
    """
    if path.suffix not in {".jsonl", ".json"}:
        raise ValueError(f"{path}: sentences about two images are read from .jsonl or .json files")
    with path.open(encoding="utf-8", errors="replace") as lines:
        rows: Iterable[str] = lines
        if path.suffix == ".json" and lines.read(1) == "[":
            lines.seek(0)
            try:
                rows = [json.dumps(row) for row in json.load(lines)]
            except ValueError as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
        elif path.suffix == ".json":
            lines.seek(0)
        filled = enumerate((row for row in rows if row.strip()), start=1)
        for number, row in itertools.islice(filled, start, None, step):
            yield _row(path, number, row)


def _row(path: Path, number: int, line: str) -> Sample | BadSample:
    key = f"{path.stem}_{number:08d}"
    try:
        row = json.loads(line)
    except ValueError:
        return BadSample(key, "bad_json")
    if not isinstance(row, dict):
        return BadSample(key, "bad_json")
    return Sample(str(row.get("identifier", key)), b"", (), row | {"folder": str(path.parent)})


def read_pair(sample: Sample, max_words: int) -> NlvrPair | BadSample:
    """Return what a row says, or what is wrong with it."""
    row = sample.meta
    sentence = row.get("sentence")
    text = clean_caption(sentence, max_words) if isinstance(sentence, str) else ""
    if not text:
        return BadSample(sample.key, "no_sentence")
    labels = {"true": True, "false": False, "none": None}
    label = str(row.get("label")).lower()
    if label not in labels:
        return BadSample(sample.key, "bad_label")
    images = _paths(row)
    if images is None:
        return BadSample(sample.key, "no_images")
    return NlvrPair(sample.key, text, labels[label], images)


def read_pairs(path: Path, max_words: int = 40) -> Iterator[NlvrPair | BadSample]:
    """Yield all pairs of a data set, or what is wrong with one."""
    for sample in read_rows(path):
        yield sample if isinstance(sample, BadSample) else read_pair(sample, max_words)


def _paths(row: Mapping[str, object]) -> tuple[tuple[Path, ...], tuple[Path, ...]] | None:
    folder, given, identifier = Path(str(row["folder"])), row.get("images"), row.get("identifier")
    if isinstance(given, list) and len(given) == 2 and all(isinstance(n, str) for n in given):
        return (folder / given[0],), (folder / given[1],)
    if not isinstance(identifier, str) or identifier.count("-") != 3:
        return None
    split, name = identifier.partition("-")[0], identifier.rpartition("-")[0]
    roots = [folder, folder / "images", folder.parent, folder.parent / "images"]
    inner = [f"{split}/{row['directory']}"] if "directory" in row else []
    places = [root / place for root in roots for place in (*inner, split, ".")]
    first, second = (tuple(place / f"{name}-img{n}.png" for place in places) for n in (0, 1))
    return first, second


def _read(paths: Sequence[Path]) -> bytes:
    for path in paths:
        if path.is_file():
            return path.read_bytes()
    raise ImageDecodeError("missing_image", f"no file at {paths[0]}")


@dataclass(frozen=True)
class NlvrBatch:
    """B sentences about two images each.

    images                (2B, 3, S, S) normalised, all first images before all second ones
    token_ids, text_mask  (B, L), [CLS] first, 1 = real token
    labels                (B,) 1 = true
    keys                  of the rows, to name them in an error
    """

    images: Tensor
    token_ids: Tensor
    text_mask: Tensor
    labels: Tensor
    keys: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "NlvrBatch":
        return NlvrBatch(
            self.images.to(device),
            self.token_ids.to(device),
            self.text_mask.to(device),
            self.labels.to(device),
            self.keys,
        )


class NlvrStream(SampleStream[NlvrPair, NlvrBatch]):
    """Sentences about two images; a row is two examples, one for each order of its images.

    The original draws one of the two orders whenever it comes to a row.
    """

    example_name = "sentence about two images"
    why_none = "no row has a label"

    def __init__(
        self,
        data: Sequence[Data],
        tokenizer: Tokenizer,
        transform: TrainTransform,
        *,
        max_tokens: int,
        max_words: int = 40,
        **options: Unpack[StreamOptions],
    ) -> None:
        """Raises ValueError if something in `data` is no data set."""
        super().__init__(data, **options)
        self.tokenizer, self.transform = tokenizer, transform
        self.max_tokens, self.max_words = max_tokens, max_words

    def read(
        self, shard: Shard, part: int, num_parts: int, *, first: int
    ) -> Iterator[Sample | BadSample]:
        if shard.is_remote:
            raise ValueError(f"{shard}: sentences about two images are read from local files alone")
        return read_rows(shard.path, start=part + first * num_parts, step=num_parts)

    def examples(self, sample: Sample, epoch: int) -> Iterator[tuple[int, NlvrPair] | BadSample]:
        pair = read_pair(sample, self.max_words)
        if isinstance(pair, BadSample):
            yield pair
        elif pair.label is None:
            yield BadSample(sample.key, "no_label")
        else:
            yield 0, pair
            yield 1, pair.swapped()

    def load(self, example: NlvrPair, rng: np.random.Generator) -> Tensor:
        may_flip = not has_left_or_right(example.sentence)
        images = [decode_image(data) for data in example.read_images()]
        return torch.stack([self.transform(one, rng, may_flip=may_flip) for one in images])

    def collate(
        self, keys: Sequence[str], examples: Sequence[NlvrPair], images: Sequence[Tensor]
    ) -> NlvrBatch:
        return collate_pairs(keys, examples, images, self.tokenizer, self.max_tokens)


def collate_pairs(
    keys: Sequence[str],
    pairs: Sequence[NlvrPair],
    images: Sequence[Tensor],
    tokenizer: Tokenizer,
    max_tokens: int,
) -> NlvrBatch:
    """Build a batch of B pairs, the keys of their rows and their images (2, 3, S, S) each.

    A label that is not known counts as false.
    """
    tokens = tokenizer.encode_batch([pair.sentence for pair in pairs], max_tokens=max_tokens)
    return NlvrBatch(
        images=torch.stack(list(images), dim=1).flatten(0, 1),
        token_ids=tokens.token_ids,
        text_mask=tokens.text_mask,
        labels=torch.tensor([int(bool(pair.label)) for pair in pairs]),
        keys=tuple(keys),
    )
