"""Images: guarded decoding, the train and eval transforms, normalisation (BLIP's values)."""

import io
import math
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from openblip.augment import RandAugment

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs."""
HASH_SIDE = 8

_SCALE = (1.0 / (255.0 * np.asarray(STD))).astype(np.float32)
_SHIFT = (-np.asarray(MEAN) / np.asarray(STD)).astype(np.float32)


class ImageDecodeError(ValueError):
    """Bytes that are no usable image; `reason` is a short name to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode to RGB: upright by EXIF, first frame, transparency on white, 16 bit scaled to 8.

    formats  names of Pillow's formats that are tried; None: all that it knows
    Raises ImageDecodeError with reason `empty`, `not_an_image`, `too_many_pixels`, `truncated`
    or `corrupt`.
    """
    if not data:
        raise ImageDecodeError("empty", "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageDecodeError("too_many_pixels", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageDecodeError("not_an_image", "no known image format") from error
    except Exception as error:  # Pillow's parsers raise whatever they stumble over
        raise ImageDecodeError("corrupt", str(error)) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageDecodeError("too_many_pixels", f"{width} x {height} > {max_pixels} pixels")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise ImageDecodeError(reason, str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if values.max(initial=0.0) > 255.0 else 255.0
        scaled = np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")


def perceptual_hash(image: Image.Image) -> int:
    """Return 64 bits that change little with size, compression and brightness (dHash)."""
    small = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.int16)
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


def to_tensor(image: Image.Image) -> Tensor:
    """Normalise an RGB image -> (3, H, W) float32."""
    pixels = np.asarray(image, dtype=np.float32) * _SCALE + _SHIFT
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def eval_transform(image: Image.Image, size_px: int) -> Tensor:
    """Resize to a square, not keeping the aspect (bicubic), and normalise -> (3, S, S)."""
    return to_tensor(image.resize((size_px, size_px), Image.Resampling.BICUBIC))


class TrainTransform:
    """Random resized crop, horizontal flip, RandAugment, normalisation.

    min_scale           smallest share of the area that a crop keeps
    num_ops, magnitude  of RandAugment; 0 operations leave it out
    flip                mirror half of the images, where the text allows it
    """

    def __init__(
        self,
        size_px: int,
        min_scale: float = 0.2,
        num_ops: int = 2,
        magnitude: int = 5,
        flip: bool = True,
    ) -> None:
        if not 0.0 < min_scale <= 1.0:
            raise ValueError(f"min_scale {min_scale} must be in (0, 1]")
        self.size_px, self.min_scale, self.flip = size_px, min_scale, flip
        self.augment = RandAugment(num_ops, magnitude)

    def __call__(
        self, image: Image.Image, rng: np.random.Generator, *, may_flip: bool = True
    ) -> Tensor:
        """Transform an RGB image -> (3, S, S)."""
        size = (self.size_px, self.size_px)
        box = self._crop(image.width, image.height, rng)
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
        if self.flip and rng.random() < 0.5 and may_flip:
            image = ImageOps.mirror(image)
        return to_tensor(self.augment(image, rng))

    def _crop(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw a box of random area and aspect 3/4 to 4/3; the centre after ten misses."""
        for _ in range(10):
            area = width * height * rng.uniform(self.min_scale, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left = int(rng.integers(0, width - w + 1))
                top = int(rng.integers(0, height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h
