import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from openblip.images import ImageDecodeError, TrainTransform, decode_image, eval_transform


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_unusual_images_become_rgb() -> None:
    red = Image.new("RGB", (8, 6), "red")
    cmyk = decode_image(encode(red.convert("CMYK"), "JPEG"))
    assert cmyk.mode == "RGB"
    assert cmyk.getpixel((4, 3))[0] > 200
    clear = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    assert decode_image(encode(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = red.convert("P")
    assert decode_image(encode(palette, transparency=palette.getpixel((0, 0)))).mode == "RGB"
    deep = Image.fromarray(np.full((6, 8), 32768, dtype=np.uint16))
    assert decode_image(encode(deep)).getpixel((0, 0)) == (128, 128, 128)
    animated = encode(red, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")])
    assert decode_image(animated).getpixel((0, 0)) == (255, 0, 0)


def test_an_image_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(Image.new("RGB", (8, 6)), "JPEG", exif=exif)).size == (6, 8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "not_an_image"),
        (encode(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")[:900], "truncated"),
        (encode(Image.new("1", (20_000, 20_000))), "too_many_pixels"),
    ],
)
def test_unusable_bytes_give_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageDecodeError) as caught:
        decode_image(data)
    assert caught.value.reason == reason


def test_eval_transform_equals_the_reference(reference: Path) -> None:
    tensors = load_file(reference / "randaugment.safetensors")
    names = [name for name in tensors if name.startswith("eval_transform.")]
    assert names
    images = {n: t for n, t in tensors.items() if n in names and t.dtype == torch.uint8}
    expected = {n: t for n, t in tensors.items() if n in names and t.dtype == torch.float32}
    assert images
    assert expected
    source = Image.fromarray(next(iter(images.values())).numpy())
    for target in expected.values():
        result = eval_transform(source, target.shape[-1])
        assert torch.allclose(result, target.view_as(result), atol=1e-5)


@pytest.mark.parametrize("num_ops", [0, 2])
def test_train_transform_is_fixed_by_its_generator(num_ops: int) -> None:
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    transform = TrainTransform(16, 0.5, num_ops, magnitude=7)
    first, second, other = (transform(image, np.random.default_rng(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (3, 16, 16)


def test_train_transform_augments_after_crop_and_flip() -> None:
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    without, with_ops = TrainTransform(16, num_ops=0), TrainTransform(16, num_ops=8, magnitude=9)
    results = [t(image, np.random.default_rng(1)) for t in (without, with_ops)]
    assert not torch.equal(*results)
    with pytest.raises(ValueError, match="magnitude 11"):
        TrainTransform(16, magnitude=11)


def test_an_image_is_mirrored_only_where_it_may_be() -> None:
    image = Image.new("RGB", (32, 32))
    image.paste("white", (16, 0, 32, 32))
    transform = TrainTransform(16, 0.9)

    def is_mirrored(seed: int, may_flip: bool) -> bool:
        left, right = transform(image, np.random.default_rng(seed), may_flip=may_flip).chunk(2, -1)
        return bool(left.mean() > right.mean())

    assert {is_mirrored(seed, True) for seed in range(40)} == {True, False}
    assert not any(is_mirrored(seed, False) for seed in range(40))
