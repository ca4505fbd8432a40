"""The published annotation formats; what they give is what the original's data sets give."""

import io
import itertools
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openblip.captions import clean_caption
from openblip.data import caption_files
from openblip.data.caption_files import json_elements
from openblip.data.rows import BadSample
from openblip.data.samples import Sample
from openblip.data.sources import kept_texts, list_shards, read_part
from openblip.evaluation.captioning import predictions


def save(folder: Path, name: str, *pictures: str, content: object) -> Path:
    """Write an annotation file, and its pictures; their widths are their places."""
    for place, picture in enumerate(pictures, start=1):
        (folder / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (place, 2)).save(folder / picture, "JPEG")
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def read(path: Path | str) -> list[Sample]:
    entries = [entry for shard in list_shards(path) for entry in read_part(shard)]
    assert not [entry for entry in entries if isinstance(entry, BadSample)]
    return [entry for entry in entries if isinstance(entry, Sample)]


def texts(sample: Sample) -> list[str]:
    return [caption.text for caption in sample.captions]


def width(sample: Sample) -> int:
    return Image.open(io.BytesIO(sample.image_bytes)).width


@pytest.fixture
def original(reference: Path) -> dict[str, Any]:
    """Return what the original's data sets gave."""
    value: dict[str, Any] = json.loads((reference / "datasets.json").read_text())
    return value


def names_of(annotation: list[dict[str, Any]]) -> list[str]:
    return sorted({row["image"] for row in annotation})


def test_blips_training_list_gives_the_originals_pairs(
    original: dict[str, Any], tmp_path: Path
) -> None:
    facts = original["coco_karpathy_train"]
    rows = facts["annotation"]
    samples = read(save(tmp_path, "train.json", *names_of(rows), content=rows))
    numbers: dict[str, int] = {}
    given = [
        [facts["prompt"] + text, numbers.setdefault(sample.key, len(numbers))]
        for sample in samples
        for _, text in kept_texts(sample, 30)
    ]
    items = facts["items_(image_size,caption,idx)"]
    assert given == [[caption, index] for _, caption, index in items]
    # The pictures of the original are 12 x 10 and up, in the order of their names.
    assert [width(sample) for sample in samples] == [size[1] - 9 for size, _, _ in items]


def test_blips_evaluation_list_gives_the_originals_ids_and_texts(
    original: dict[str, Any], tmp_path: Path
) -> None:
    captioning = original["coco_karpathy_caption_eval"]
    rows = captioning["annotation"]
    samples = read(save(tmp_path, "test.json", *names_of(rows), content=rows))
    written = predictions(samples, {sample.key: "x" for sample in samples})
    expected = [image_id for _, image_id in captioning["items_(image_size,image_id)"]]
    assert [one["image_id"] for one in written] == expected
    retrieval = original["coco_karpathy_retrieval_eval"]
    given = [[clean_caption(text) for text in texts(sample)] for sample in samples]
    assert list(itertools.chain(*given)) == retrieval["text"]
    counter = itertools.count()
    owned = {str(i): [next(counter) for _ in several] for i, several in enumerate(given)}
    assert owned == retrieval["img2txt"]


def test_blips_nocaps_list_gives_the_originals_ids(
    original: dict[str, Any], tmp_path: Path
) -> None:
    expected = [image_id for _, image_id in original["nocaps_eval"]]
    rows = [{"image": f"val/{place}.jpg", "img_id": n} for place, n in enumerate(expected)]
    samples = read(save(tmp_path, "val.json", *names_of(rows), content=rows))
    written = predictions(samples, {sample.key: "a dog" for sample in samples})
    assert written == [{"image_id": n, "caption": "a dog"} for n in expected]
    assert [texts(sample) for sample in samples] == [[]] * len(expected)


def karpathy(dataset: str) -> dict[str, Any]:
    """Return annotations as dataset_coco.json and dataset_flickr30k.json hold them."""
    images = []
    for place, split in enumerate(["train", "test", "restval", "val"]):
        image: dict[str, Any] = {
            "sentids": [2 * place, 2 * place + 1],
            "imgid": place,
            "sentences": [
                {"tokens": ["a"], "raw": f"Raw {place} {i}.", "imgid": place, "sentid": i}
                for i in range(2)
            ],
            "split": split,
            "filename": f"{place}.jpg",
        }
        if dataset == "coco":
            image |= {"filepath": "val2014", "cocoid": 100 + place}
        elif split == "restval":
            continue
        images.append(image)
    return {"images": images, "dataset": dataset}


def test_karpathys_splits_are_chosen(tmp_path: Path) -> None:
    pictures = [f"{folder}{place}.jpg" for folder in ("val2014/", "") for place in range(4)]
    path = save(tmp_path, "dataset_coco.json", *pictures, content=karpathy("coco"))
    assert [sample.key for sample in read(f"{path}#train")] == ["100", "102"]
    [test] = read(f"{path}#test")
    assert (test.key, texts(test), width(test)) == ("101", ["Raw 1 0.", "Raw 1 1."], 2)
    with pytest.raises(ValueError, match=r"holds several splits: choose one, as in .*json#train"):
        read(path)
    with pytest.raises(ValueError, match="the splits are restval, test, train, val"):
        read(f"{path}#dev")
    path = save(tmp_path, "dataset_flickr30k.json", content=karpathy("flickr30k"))
    assert [(sample.key, width(sample)) for sample in read(f"{path}#val")] == [("3", 8)]


def test_nocaps_and_test_sets_are_as_cocos(tmp_path: Path) -> None:
    images = [
        {"id": 0, "open_images_id": "0013", "file_name": "a.jpg", "domain": "near-domain",
         "width": 4, "height": 4, "license": 1},
        {"id": 1, "open_images_id": "0014", "file_name": "b.jpg", "domain": "out-domain",
         "width": 4, "height": 4, "license": 1},
    ]  # fmt: skip
    captions = [{"image_id": i % 2, "id": i, "caption": f"c{i}"} for i in range(4)]
    content = {"info": {"year": 2018}, "licenses": [{"id": 1}], "images": images}
    path = save(
        tmp_path, "val.json", "a.jpg", "b.jpg", content={**content, "annotations": captions}
    )
    first, second = read(path)
    assert (first.key, texts(first)) == ("0", ["c0", "c2"])
    assert first.meta == {"domain": "near-domain", "open_images_id": "0013"}
    assert texts(second) == ["c1", "c3"]
    bare = read(save(tmp_path, "test.json", content=content))
    assert [(sample.key, texts(sample)) for sample in bare] == [("0", []), ("1", [])]
    with pytest.raises(ValueError, match="not divided into splits"):
        read(f"{path}#val")


def test_visual_genomes_regions_are_captions_of_their_image(tmp_path: Path) -> None:
    content = [
        {"id": n, "regions": [{"region_id": i, "image_id": n, "phrase": f"p{n}{i}", "x": 1, "y": 1}
                              for i in range(2)]}
        for n in (1, 2)
    ]  # fmt: skip
    pictures = ("VG_100K/1.jpg", "VG_100K_2/2.jpg")
    path = save(tmp_path, "region_descriptions.json", *pictures, content=content)
    first, second = read(path)
    assert (first.key, texts(first), width(first)) == ("1", ["p10", "p11"], 1)
    assert (second.key, width(second)) == ("2", 2)


@pytest.mark.parametrize("size", [1, 2, 7, 1 << 18])
def test_pieces_of_any_size_are_decoded_alike(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_files, "CHUNK_CHARACTERS", size)
    path = tmp_path / "x.json"
    values = [1, 12.5, 'a " \\ é\n', None, [1, [2]], {"x": {"y": []}}, -3, True]
    for indent in (None, 1):
        path.write_text(json.dumps(values, indent=indent))
        assert [element for _, element in json_elements(path)] == values
        path.write_text(json.dumps({"a": values, "n": 1234, "b": [], "c": "x"}, indent=indent))
        expected = [("a", value) for value in values] + [("n", 1234), ("c", "x")]
        assert list(json_elements(path)) == expected
    for broken in ("", "[1, 2", "[1 2]", '{"a" 1}', '{"a": [1}', "nothing", '{"a": 1'):
        path.write_text(broken)
        with pytest.raises(json.JSONDecodeError):
            list(json_elements(path))


def test_an_annotation_file_is_not_held(tmp_path: Path) -> None:
    path = save(tmp_path, "x.json", content=[{"image": "a.jpg", "caption": "x" * 2000}] * 2000)
    elements: Iterator[Any] = json_elements(path)
    next(elements)
    tracemalloc.start()
    assert sum(1 for _ in elements) == 1999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 2_500_000
    assert peak < 2_000_000
