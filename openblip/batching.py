"""Images and texts of any number, in batches that fit the memory; images are read beside the work.

Letters: I images, S image side in pixels, N patches, D width.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from openblip.backend import Backend
from openblip.data.prefetch import map_beside
from openblip.images import decode_image, eval_transform
from openblip.models.context import Context
from openblip.models.text import MedConfig
from openblip.models.vision import VisionConfig
from openblip.tokenizer import TokenBatch

TOKENS_AT_ONCE = 4096
"""Tokens of all texts that are encoded together: what is computed of them stays near the cache."""
USED_SHARE = 0.5
"""Of the free memory: others need some too."""
MOST_IMAGES = {"cpu": 16, "cuda": 128}
"""Beyond these a batch is no faster."""
BYTES_PER_VALUE = 4
ACTIVATIONS = 12
"""Arrays of an image's states that are alive at once, the widest ones counted by their width."""


_log = logging.getLogger(__name__)

ImageLike = Tensor | bytes | Path | Image.Image
"""A prepared image (3, S, S), a file's bytes, its path, or an opened one."""
T = TypeVar("T")


class Encoded:
    """Images that an engine has encoded, to ask several things of.

    states   (I, 1 + N, D), on the model's device
    context  keys and values that texts look at, made when first asked for; they take up to 24 times
             the memory of the states: `Encoded(encoded.states, encoded.backend)` is without them
    """

    def __init__(self, states: Tensor, backend: Backend, context: Context | None = None) -> None:
        self.states, self.backend, self._context = states, backend, context

    def __len__(self) -> int:
        return self.states.shape[0]

    def __getitem__(self, part: slice) -> "Encoded":
        context = None if self._context is None else self._context[part]
        return Encoded(self.states[part], self.backend, context)

    @property
    def context(self) -> Context:
        if self._context is None:
            self._context = self.backend.project_context(self.states)
        return self._context


Images = Iterable[ImageLike] | Tensor | Encoded
"""Images one by one; prepared ones (I, 3, S, S), which are one batch; or encoded ones."""
H = TypeVar("H", Tensor, Encoded)


class Batcher:
    """Makes batches (I, 3, S, S) of at most `batch_size` images, and fewer once memory ran out."""

    def __init__(self, size_px: int, batch_size: int) -> None:
        self.size_px, self.batch_size = size_px, batch_size

    def prepare(self, image: ImageLike) -> Tensor:
        """Decode and resize an image -> (3, S, S). Raises ImageDecodeError, and as reading does."""
        match image:
            case Tensor():
                return image
            case bytes():
                return read_image(image, self.size_px)
            case Path():
                return read_image(image.read_bytes(), self.size_px)
            case _:
                return eval_transform(image.convert("RGB"), self.size_px)

    def prepared(self, images: Iterable[ImageLike] | Tensor) -> Iterator[Tensor]:
        """Yield prepared images in batches, read in threads beside the model."""
        if isinstance(images, Tensor):
            if len(images):
                yield images
            return
        batch: list[Tensor] = []
        for image in map_beside(self.prepare, images):
            batch.append(image)
            if len(batch) == self.batch_size:
                yield torch.stack(batch)
                batch = []
        if batch:
            yield torch.stack(batch)

    def run(
        self,
        images: Images,
        encode: Callable[[Tensor], Encoded],
        work: Callable[[Encoded], list[T]],
    ) -> list[T]:
        """Encode images in batches and collect what `work` makes of each."""
        results: list[T] = []
        if isinstance(images, Encoded):
            for start in range(0, len(images), self.batch_size):
                results += self.halving(images[start : start + self.batch_size], work)
            return results
        for pixels in self.prepared(images):
            results += self.halving(pixels, lambda part: work(encode(part)))
        return results

    def halving(self, batch: H, work: Callable[[H], list[T]]) -> list[T]:
        """Do the work on a batch, in halves where the memory does not suffice."""
        try:
            return work(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
        half = len(batch) // 2
        self.batch_size = max(1, half)
        _log.warning("out of memory with %d images, going on with %d", len(batch), half)
        first: H = batch[:half]
        second: H = batch[half:]
        return [*self.halving(first, work), *self.halving(second, work)]


def read_image(data: bytes, size_px: int) -> Tensor:
    """Decode and prepare one image -> (3, S, S). Raises ImageDecodeError."""
    return eval_transform(decode_image(data), size_px)


def fitting_batch(vision: VisionConfig, text: MedConfig, device: torch.device) -> int:
    """Return the number of images, 1 at least, whose states, keys and values fit `device`."""
    positions = 1 + vision.num_patches
    values = positions * (2 * text.num_layers * text.width + ACTIVATIONS * vision.width)
    fitting = int(USED_SHARE * free_bytes(device)) // (BYTES_PER_VALUE * values)
    return max(1, min(fitting, MOST_IMAGES.get(device.type, MOST_IMAGES["cuda"])))


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; of a system that does not tell, 2 GiB."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if device.type == "cpu" and info.exists():
        return bytes_of("MemAvailable", info)
    return 2 << 30


def bytes_of(field: str, file: Path) -> int:
    """Return what a file of /proc says of a field, in bytes."""
    lines = file.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the memory did not suffice."""
    told = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in told
    )


def join_texts(tokens: Sequence[TokenBatch]) -> TokenBatch:
    """Put batches of texts behind each other, padded to the longest."""
    length = max((one.token_ids.shape[1] for one in tokens), default=0)
    widened = [
        (F.pad(one.token_ids, (0, length - one.token_ids.shape[1])),
         F.pad(one.text_mask, (0, length - one.text_mask.shape[1])))
        for one in tokens
    ]  # fmt: skip
    ids, masks = zip(*widened, strict=True) if widened else ((), ())
    empty = torch.zeros(0, length, dtype=torch.long)
    return TokenBatch(
        torch.cat([empty, *ids]),
        torch.cat([empty, *masks]),
        sum(one.num_truncated for one in tokens),
    )


def text_parts(tokens: TokenBatch) -> Iterator[slice]:
    """Cut texts into runs of at most TOKENS_AT_ONCE tokens, padding not counted."""
    start, total = 0, 0
    for place, length in enumerate(tokens.text_mask.sum(dim=1).tolist()):
        if total and total + length > TOKENS_AT_ONCE:
            yield slice(start, place)
            start, total = place, 0
        total += length
    if total:
        yield slice(start, len(tokens.text_mask))
