"""Near-duplicates and clusters."""

import io

import pytest
from PIL import Image

from openblip.search.cluster import clusters, duplicate_groups
from openblip.search.index import Index


@pytest.fixture
def index(source, add, pictures, tmp_path) -> Index:
    """Return an index of twelve pictures, and of three others that one of them was saved as."""
    folder = source("folder")
    image = Image.open(io.BytesIO(pictures["picture_04"]))
    image.save(folder / "again.png")
    image.resize((96, 96), Image.Resampling.BICUBIC).save(folder / "larger.jpg", quality=95)
    (folder / "copy.jpg").write_bytes(pictures["picture_04"])
    add(folder, tmp_path / "index")
    return Index.open(tmp_path / "index")


@pytest.mark.parametrize("max_hash_bits", [3, -1])
def test_copies_of_a_picture_are_found(index, max_hash_bits) -> None:
    groups = duplicate_groups(index, min_similarity=0.999, max_hash_bits=max_hash_bits)
    named = [{index.key(number) for number in group} for group in groups]
    assert {"picture_04", "copy", "again"} <= named[0]


def test_pairs_by_looks_are_those_of_a_plain_comparison(index) -> None:
    hashes = index.column("hash").to_pylist()
    groups = duplicate_groups(index, min_similarity=-1, max_hash_bits=2)
    found = {number for group in groups for number in group}
    alike = {
        one
        for one in range(len(hashes))
        for other in range(len(hashes))
        if one != other and (hashes[one] ^ hashes[other]).bit_count() <= 2
    }
    assert found == alike


def test_every_image_is_in_one_cluster(index) -> None:
    found = clusters(index, 4)
    numbers = sorted(number for one in found for number in one.numbers)
    assert numbers == list(range(len(index)))
    assert [len(one.numbers) for one in found] == sorted(
        (len(one.numbers) for one in found), reverse=True
    )
    assert clusters(index, 4) == found
    [everything] = clusters(index, 1)
    assert len(everything.numbers) == len(index)


def test_values_out_of_range_are_told(index) -> None:
    with pytest.raises(ValueError, match="0 clusters of 15 images"):
        clusters(index, 0)
    with pytest.raises(ValueError, match="max_hash_bits 4"):
        duplicate_groups(index, min_similarity=0.9, max_hash_bits=4)
    with pytest.raises(ValueError, match="is no cosine"):
        duplicate_groups(index, min_similarity=1.5)
