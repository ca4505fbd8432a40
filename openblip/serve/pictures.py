"""Pictures that strangers send: looked at before they are decoded, and only as what they claim."""

import io
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from openblip.images import ImageDecodeError, decode_image, eval_transform
from openblip.serve.errors import RequestError

FORMATS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "WEBP": (b"RIFF",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
}
"""Kinds of files that are opened, by how they begin. Pillow knows many more, which few people send
and few people test."""

MOST_THUMBNAILS = 512


@dataclass(frozen=True)
class Picture:
    """A picture as it was sent, its format, and its size in pixels."""

    data: bytes
    kind: str
    width: int
    height: int

    def prepared(self, size_px: int, max_pixels: int) -> Tensor:
        """Return it as a model takes it -> (3, S, S). Raises RequestError for a damaged one."""
        return eval_transform(self.opened(max_pixels), size_px)

    def opened(self, max_pixels: int) -> Image.Image:
        """Decode it. Raises RequestError for a damaged one."""
        try:
            return decode_image(self.data, max_pixels=max_pixels, formats=(self.kind,))
        except ImageDecodeError as error:
            raise _unusable(error.reason, str(error)) from error


def checked_picture(data: bytes, max_pixels: int) -> Picture:
    """Look at the head of a picture. Raises RequestError for what will not be decoded."""
    if not data:
        raise _unusable("empty", "the picture has no bytes")
    kind = next((name for name, starts in FORMATS.items() if data.startswith(starts)), None)
    if kind is None:
        raise RequestError(
            415, "unsupported_format", f"the picture is none of {', '.join(FORMATS)}"
        )
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise RequestError(413, "too_many_pixels", str(error)) from error
    except Exception as error:  # Pillow's parsers raise whatever they stumble over
        raise _unusable("corrupt", f"the picture is no readable {kind}") from error
    if width * height > max_pixels:
        raise RequestError(
            413, "too_many_pixels", f"the picture has {width} x {height} pixels, more than the "
            f"{max_pixels} that are allowed"
        )  # fmt: skip
    return Picture(data, kind, width, height)


def thumbnail(data: bytes, side_px: int, max_pixels: int) -> bytes:
    """Encode a picture anew as JPEG, no side longer than `side_px`. Raises RequestError."""
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except ImageDecodeError as error:
        raise _unusable(error.reason, str(error)) from error
    image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


class Thumbnails:
    """The thumbnails that a server made last, by what they are of."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()

    def get(self, name: Hashable, make: Callable[[], bytes]) -> bytes:
        """Return a thumbnail, made unless it is kept."""
        kept = self._kept.get(name)
        if kept is None:
            kept = make()
            self._kept[name] = kept
            while len(self._kept) > MOST_THUMBNAILS:
                self._kept.popitem(last=False)
        return kept


def _unusable(reason: str, message: str) -> RequestError:
    status = 413 if reason == "too_many_pixels" else 422
    return RequestError(status, f"bad_image_{reason}" if status == 422 else reason, message)
