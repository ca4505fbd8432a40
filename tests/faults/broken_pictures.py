"""Pictures that are damaged, or made to do harm."""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence

from PIL import Image

Damage = Callable[[bytes, random.Random], bytes]
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM")


def broken_pictures(pictures: Sequence[bytes], draw: random.Random) -> Iterator[bytes]:
    """Yield pictures without end, most of them damaged, in many formats."""
    sources = []
    for data in pictures:
        with Image.open(io.BytesIO(data)) as image:
            for kind in KINDS:
                buffer = io.BytesIO()
                image.convert("RGB").save(buffer, kind)
                sources.append(buffer.getvalue())
    while True:
        yield draw.choice(DAMAGES)(draw.choice(sources), draw)


def _whole(data: bytes, draw: random.Random) -> bytes:
    return data


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 4, 50))):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _head_of_another(data: bytes, draw: random.Random) -> bytes:
    start = draw.choice((b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF89a", b"BM"))
    return start + data[len(start) :]


def _polyglot(data: bytes, draw: random.Random) -> bytes:
    more = draw.choice((b"<script>alert(1)</script>", b"%PDF-1.7\n", b"PK\x03\x04", b"#!/bin/sh\n"))
    return draw.choice((more + data, data + more))


def _noise(data: bytes, draw: random.Random) -> bytes:
    start = draw.choice((b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"BM"))
    return start + draw.randbytes(draw.randrange(2000))


def _bomb(data: bytes, draw: random.Random) -> bytes:
    """Return a PNG that says it has far more pixels than there are."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    width, height = draw.choice(((60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 9), (9, 0)))
    depth, colours = draw.choice(((8, 2), (16, 6), (1, 0), (8, 9), (77, 2)))
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    body = zlib.compress(b"\0" * draw.choice((10, 100_000)))
    # A text that unfolds to far more than it takes.
    text = b"note\0\0" + zlib.compress(b"x" * 3_000_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"zTXt", text)
        + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )  # fmt: skip


def _gif_of_large_screen(data: bytes, draw: random.Random) -> bytes:
    return b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\0\0" + draw.randbytes(300)


def _bmp_of_odd_size(data: bytes, draw: random.Random) -> bytes:
    width, height = draw.choice(((-5, 5), (5, -5), (2**31 - 1, 3), (0, 0), (40_000, 40_000)))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + info + draw.randbytes(100)


DAMAGES: tuple[Damage, ...] = (
    _whole, _cut, _cut, _flipped, _flipped, _head_of_another, _polyglot, _noise, _bomb,
    _gif_of_large_screen, _bmp_of_odd_size,
)  # fmt: skip
