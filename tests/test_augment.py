import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from openblip.augment import GEOMETRIC_OPS, OPS, RandAugment, apply_op

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def arrays(reference: Path) -> Arrays:
    return load_file(reference / "randaugment.safetensors")


@pytest.fixture(scope="module")
def described(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "randaugment.json").read_text(encoding="utf-8"))


@pytest.fixture
def photo() -> Image.Image:
    """Return smooth colours; the height is no multiple of a strip of rows."""
    y, x = np.mgrid[0:75, 0:51]
    pixels = np.stack([x * 5, y * 3, (x * y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_operations_equal_the_reference(arrays: Arrays, described: dict[str, Any]) -> None:
    image = Image.fromarray(arrays["image"])
    cases = [case for case in described["ops"] if case["used_by_BLIP"]]
    assert {case["op"] for case in cases} == set(OPS)
    for case in cases:
        direction = float(case["tensor"].rpartition(".u")[2])
        result = apply_op(case["op"], image, case["level"], direction)
        np.testing.assert_array_equal(
            np.asarray(result), arrays[case["tensor"]], err_msg=case["tensor"]
        )


def test_seeded_calls_equal_the_reference(arrays: Arrays, described: dict[str, Any]) -> None:
    image = Image.fromarray(arrays["image"])
    (calls,) = (value for key, value in described.items() if key.startswith("full_calls"))
    assert calls
    for call in calls:
        num_ops, magnitude = len(call["ops_sampled"]), call["ops_sampled"][0][2]
        rng = np.random.RandomState(call["numpy_seed"])
        result = np.asarray(RandAugment(num_ops, magnitude)(image, rng))
        np.testing.assert_array_equal(result, arrays[f"full.seed{call['numpy_seed']}"])
        assert np.array_equal(result, arrays["image"]) == call["output_equals_input"]


def test_the_generator_fixes_the_result(photo: Image.Image) -> None:
    augment = RandAugment(num_ops=4, magnitude=7)
    first, again, other = (augment(photo, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_every_operation_is_drawn_and_about_half_are_applied(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied = []

    def note(op: str, image: Image.Image, magnitude: int, direction: float) -> Image.Image:
        applied.append(op)
        return image

    monkeypatch.setattr("openblip.augment.apply_op", note)
    RandAugment(num_ops=2000)(photo, np.random.default_rng(0))
    assert set(applied) == set(OPS)
    assert 900 < len(applied) < 1100


@pytest.mark.parametrize("op", sorted(GEOMETRIC_OPS))
@pytest.mark.parametrize("direction", [0.25, 0.75])
def test_magnitude_zero_moves_nothing(op: str, direction: float, photo: Image.Image) -> None:
    assert apply_op(op, photo, 0, direction) == photo


@pytest.mark.parametrize("op", ["ShearX", "ShearY", "Rotate"])
def test_a_warp_in_strips_has_no_seams(
    op: str, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for rows in (1, 7, photo.height):
        monkeypatch.setattr("openblip.augment._STRIP", rows)
        results.append(apply_op(op, photo, 10))
    assert results[0] == results[1] == results[2] != photo


def test_a_turn_keeps_the_middle_and_leaves_grey_corners() -> None:
    flat = Image.new("RGB", (97, 64), (200, 100, 0))
    turned = np.asarray(apply_op("Rotate", flat, 10))
    assert tuple(turned[32, 48]) == (200, 100, 0)
    assert tuple(turned[0, 0]) == (128, 128, 128)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 1)])
def test_tiny_images_pass(op: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    assert apply_op(op, image, 10).size == size


def test_brightness_and_sharpness_do_nothing_at_five(photo: Image.Image) -> None:
    for op in ("Brightness", "Sharpness"):
        assert apply_op(op, photo, 5) == photo
        assert apply_op(op, photo, 6) != photo


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_ops -1"):
        RandAugment(-1)
    for magnitude in (-1, 11):
        with pytest.raises(ValueError, match=f"magnitude {magnitude}"):
            RandAugment(2, magnitude)
