"""RandAugment as BLIP's released code has it, equal to the digit.

The original computes with OpenCV, whose warp knows 32 positions between two pixels; numpy does
the same arithmetic here. None of the reference's values differs. Operations that BLIP leaves out
of its list (Solarize, Posterize, Color, Contrast) are left out.
"""

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

Op = Literal[
    "Identity", "AutoContrast", "Brightness", "Sharpness", "Equalize",
    "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
]  # fmt: skip
OPS: tuple[Op, ...] = get_args(Op)
"""In BLIP's order, which the draws depend on."""
GEOMETRIC_OPS: frozenset[Op] = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})
"""Those that draw a direction."""
MAX_MAGNITUDE = 10

_FILL = 128
_STRIP = 32
"""Rows that a warp takes at once: what it makes of them stays in the processor's cache."""

Table = NDArray[np.uint8]
Packed = NDArray[np.uint64]
Affine = tuple[float, float, float, float, float, float]


class RandAugment:
    """Apply `num_ops` operations drawn with replacement, each with probability 1/2.

    magnitude  0 to 10. One step is a shear of 0.03, a shift by 1 pixel, a turn by 3 degrees;
               brightness and sharpness get the factor 0.1 + 0.18 a step: none at 5, BLIP's value
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 5) -> None:
        if num_ops < 0:
            raise ValueError(f"num_ops {num_ops} must be 0 or more")
        if not 0 <= magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"magnitude {magnitude} must be from 0 to {MAX_MAGNITUDE}")
        self.num_ops, self.magnitude = num_ops, magnitude

    def __call__(
        self, image: Image.Image, rng: np.random.Generator | np.random.RandomState
    ) -> Image.Image:
        """Augment an RGB image; a RandomState gives what the original gives for its seed."""
        for index in rng.choice(len(OPS), self.num_ops):
            if rng.random() <= 0.5:
                op = OPS[index]
                direction = rng.random() if op in GEOMETRIC_OPS else 0.0
                image = apply_op(op, image, self.magnitude, direction)
        return image


def apply_op(op: Op, image: Image.Image, magnitude: int, direction: float = 0.0) -> Image.Image:
    """Apply one operation to an RGB image; uncovered places become grey.

    direction  in [0, 1): above 1/2 it reverses shear and shift, below 1/2 it reverses Rotate
    """
    share = magnitude / MAX_MAGNITUDE
    sign = -1 if direction > 0.5 else 1
    shear = float(np.float32(sign * share * 0.3))
    match op:
        case "Identity":
            return image
        case "AutoContrast":
            return _look_up(image, [_stretch(*band.getextrema()) for band in image.split()])
        case "Equalize":
            counts = np.array(image.histogram()).reshape(3, 256)
            return _look_up(image, [_equalize(row) for row in counts])
        case "Brightness":
            values = np.arange(256, dtype=np.float32) * np.float32(share * 1.8 + 0.1)
            return _look_up(image, [values.clip(0, 255).astype(np.uint8)] * 3)
        case "Sharpness":
            return _sharpen(image, share * 1.8 + 0.1)
        case "ShearX":
            return _warp(image, (1.0, -shear, 0.0, 0.0, 1.0, 0.0))
        case "ShearY":
            return _warp(image, (1.0, 0.0, 0.0, -shear, 1.0, 0.0))
        case "TranslateX":
            return _shift(image, -sign * magnitude, 0)
        case "TranslateY":
            return _shift(image, 0, -sign * magnitude)
        case "Rotate":
            return _rotate(image, (-30 if direction < 0.5 else 30) * share)


def _look_up(image: Image.Image, tables: list[Table]) -> Image.Image:
    return image.point(np.concatenate(tables).tolist())


def _stretch(low: int, high: int) -> Table:
    """Spread low..high over 0..255 if low is 0; white above it, as the original has it.

    It negates an unsigned byte, so that -low becomes 256 - low.
    """
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255 / (high - low)
    return (np.arange(256) * scale + (-low % 256) * scale).clip(0, 255).astype(np.uint8)


def _equalize(counts: NDArray[np.int64]) -> Table:
    step = int(counts[counts > 0][:-1].sum()) // 255
    if step == 0:
        return np.arange(256, dtype=np.uint8)
    below = np.cumsum(counts) - counts
    return ((below + step // 2) // step).clip(0, 255).astype(np.uint8)


def _sharpen(image: Image.Image, factor: float) -> Image.Image:
    """Move away from the smoothed image; values out of range wrap, as in the original."""
    if factor == 1.0:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    smooth = np.asarray(image.filter(ImageFilter.SMOOTH), dtype=np.float32)
    result = smooth + np.float32(factor) * (pixels - smooth)
    return Image.fromarray(result.astype(np.int32).astype(np.uint8))


def _shift(image: Image.Image, right: int, down: int) -> Image.Image:
    canvas = Image.new("RGB", image.size, (_FILL, _FILL, _FILL))
    canvas.paste(image, (right, down))
    return canvas


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Turn anticlockwise about (W/2, H/2)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.width / 2, image.height / 2
    return _warp(image, (c, -s, (1 - c) * x + s * y, s, c, (1 - c) * y - s * x))


def _warp(image: Image.Image, to_source: Affine) -> Image.Image:
    """Sample bilinearly at `to_source` of each pixel, in the fixed point of OpenCV's warpAffine.

    A position is the sum of two roundings to 1/1024 pixel, cut to 1/32.
    """
    a, b, c, d, e, f = to_source
    width, height = image.size
    # With two pixels of border, any pair of neighbours is in it, in the image or across its edge.
    stride = width + 4
    pixels = _pack(ImageOps.expand(image, 2, (_FILL, _FILL, _FILL)))
    result = np.empty((height, width, 3), dtype=np.uint8)
    x = np.arange(width, dtype=np.float64)
    for start in range(0, height, _STRIP):
        y = np.arange(start, min(start + _STRIP, height), dtype=np.float64)[:, None]
        column = (_round((b * y + c) * 1024) + _round(a * x * 1024) + 16) >> 5
        row = (_round((e * y + f) * 1024) + _round(d * x * 1024) + 16) >> 5
        place = ((row >> 5) + 2).clip(0, height + 2) * stride
        place += ((column >> 5) + 2).clip(0, width + 2)
        dx, dy = (column & 31).astype(np.uint64), (row & 31).astype(np.uint64)
        top = _blend(pixels.take(place), pixels.take(place + 1), dx)
        place += stride
        bottom = _blend(pixels.take(place), pixels.take(place + 1), dx)
        _unpack(_blend(top, bottom, dy), result[start : start + _STRIP])
    return Image.fromarray(result)


def _round(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(values).astype(np.int64)


def _pack(image: Image.Image) -> Packed:
    """Put the channels into one integer, with room in each for 255 * 32 * 32."""
    red, green, blue = (np.asarray(band).astype(np.uint64) for band in image.split())
    green <<= np.uint64(21)
    blue <<= np.uint64(42)
    return np.bitwise_or(red, np.bitwise_or(green, blue, out=green), out=red)


def _blend(first: Packed, second: Packed, weight: Packed) -> Packed:
    """Compute (32 - weight) * first + weight * second of all channels at once."""
    # A negative difference borrows from the next channel; the sum gives it back.
    second -= first
    second *= weight
    first <<= np.uint64(5)
    first += second
    return first


def _unpack(packed: Packed, target: NDArray[np.uint8]) -> None:
    """Divide by 32 * 32, rounding, and take the channels apart."""
    packed += np.uint64(512 << 42 | 512 << 21 | 512)
    for channel in range(3):
        target[..., channel] = packed >> np.uint64(10 + 21 * channel)
