import io
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.batches import ImageTextBatch, stable_id
from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter
from openblip.data.stream import PairStream
from openblip.images import TrainTransform
from openblip.tokenizer import Tokenizer

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]
TOKENIZER = Tokenizer.train(
    [*WORDS, "a picture of", "left of", "right of"], vocab_size=120, min_frequency=1
)


def jpeg(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (value, 255 - value, 128)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(folder: Path, *shards: Sequence[Sample]) -> Path:
    for index, samples in enumerate(shards):
        with ShardWriter(folder / f"{index}.tar") as writer:
            for sample in samples:
                writer.write(sample)
    return folder


def samples(words: Sequence[str]) -> list[Sample]:
    return [
        Sample(f"key_{word}", jpeg(20 * index), (Caption(word),))
        for index, word in enumerate(words)
    ]


def stream(folder: Path, batch_size: int = 2, **options: object) -> PairStream:
    values = {"seed": 0, "max_tokens": 12, "transform": TrainTransform(16, 0.5, num_ops=0)}
    return PairStream(
        paths=[folder], tokenizer=TOKENIZER, batch_size=batch_size, **(values | options)
    )


def take(pairs: PairStream, num: int) -> list[ImageTextBatch]:
    return list(itertools.islice(iter(pairs), num))


def texts(batches: Sequence[ImageTextBatch]) -> list[str]:
    return [TOKENIZER.decode(row.tolist()) for batch in batches for row in batch.token_ids]


def test_the_same_seed_gives_the_same_batches(tmp_path: Path) -> None:
    folder = write(tmp_path, samples(WORDS[:4]), samples(WORDS[4:]))
    first, second, other = (take(stream(folder, seed=seed), 12) for seed in (1, 1, 2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.token_ids, b.token_ids)
        assert torch.equal(a.image_ids, b.image_ids)
    assert texts(first) != texts(other)


@pytest.mark.parametrize("buffer_size", [2, 5, 20_000])
def test_an_epoch_has_every_pair_once_and_the_next_another_order(
    tmp_path: Path, buffer_size: int
) -> None:
    folder = write(tmp_path, samples(WORDS[:3]), samples(WORDS[3:]))
    read = texts(take(stream(folder, buffer_size=buffer_size), 12))
    epochs = [read[i : i + len(WORDS)] for i in range(0, 24, len(WORDS))]
    assert [sorted(epoch) for epoch in epochs] == [WORDS] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_every_kept_caption_is_a_pair_of_its_own(tmp_path: Path) -> None:
    captions = (
        Caption("Ant!"),
        Caption("bee", drop_reason="unmatched"),
        Caption("cat", "synthetic"),
        Caption(" ... "),
    )
    folder = write(tmp_path, [Sample("x", jpeg(), captions), Sample("y", jpeg())])
    [batch] = take(stream(folder), 1)
    assert sorted(texts([batch])) == ["ant", "cat"]
    assert batch.image_ids.tolist() == [stable_id("x")] * 2
    assert len(set(batch.text_ids.tolist())) == 2


def test_what_cannot_be_used_is_counted_and_left_out(tmp_path: Path) -> None:
    good = samples(WORDS[:3])
    bad = [Sample("b1", b"no image", (Caption("elk"),)), Sample("b2", b"", (Caption("fox"),))]
    folder = write(tmp_path, [*good, *bad])
    pairs = stream(folder, batch_size=3)
    assert sorted(texts(take(pairs, 1))) == WORDS[:3]
    one_epoch = stream(folder, batch_size=3)
    batches = one_epoch._batches()
    for _ in range(2):
        next(batches)
    assert one_epoch.problems.keys() == {"not_an_image", "empty"}
    assert all(1 <= count <= 2 for count in one_epoch.problems.values())


def test_data_without_a_usable_pair_are_refused(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare", [Sample("x", jpeg())])
    with pytest.raises(ValueError, match="no image has a caption"):
        take(stream(bare), 1)
    broken = write(tmp_path / "broken", [Sample("x", b"no image", (Caption("elk"),))])
    with pytest.raises(ValueError, match="not_an_image"):
        take(stream(broken), 1)
    with pytest.raises(ValueError, match="is no data set"):
        take(stream(tmp_path / "absent"), 1)


@pytest.mark.parametrize("num", [1, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 7])
def test_batches_are_filled_across_epochs(tmp_path: Path, num: int, batch_size: int) -> None:
    """However few the pairs and long the batches, every epoch's pairs follow the last one's."""
    folder = write(tmp_path, samples(WORDS[:num]))
    read = texts(take(stream(folder, batch_size=batch_size), 2 * num))
    assert Counter(read) == dict.fromkeys(WORDS[:num], 2 * batch_size)


def test_a_caption_that_names_a_side_is_never_mirrored(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32))
    picture.paste("white", (16, 0, 32, 32))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    both = [
        Sample(word, buffer.getvalue(), (Caption(text),), image_extension="png")
        for word, text in (("plain", "ant bee"), ("sided", "ant left of bee"))
    ]
    folder = write(tmp_path, both)
    mirrored: dict[bool, set[bool]] = {True: set(), False: set()}
    for batch in take(stream(folder, transform=TrainTransform(16, 0.9, num_ops=0)), 40):
        for image, text in zip(batch.images, texts([batch]), strict=True):
            left, right = image.chunk(2, dim=-1)
            mirrored["left" in text].add(bool(left.mean() > right.mean()))
    assert mirrored == {True: {False}, False: {True, False}}


def test_a_prefix_stands_before_every_text(tmp_path: Path) -> None:
    folder = write(tmp_path, samples(WORDS))
    read = texts(take(stream(folder, prefix="a picture of "), 4))
    assert sorted(read) == [f"a picture of {word}" for word in WORDS]


def test_texts_are_cut_by_words_and_tokens(tmp_path: Path) -> None:
    long = " ".join(WORDS)
    folder = write(tmp_path, [Sample("x", jpeg(), (Caption(long),))])
    [text] = texts(take(stream(folder, batch_size=1, max_words=3), 1))
    assert text == "ant bee cat"
    [batch] = take(stream(folder, batch_size=1, max_tokens=6), 1)
    assert batch.token_ids.shape == (1, 6)
    assert batch.token_ids[0, -1] == TOKENIZER.special.sep


def test_an_image_is_augmented_anew_each_epoch(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    folder = write(
        tmp_path, [Sample("x", buffer.getvalue(), (Caption("ant"),), image_extension="png")]
    )
    first, second = take(stream(folder, batch_size=1), 2)
    assert not torch.equal(first.images, second.images)
