import base64
import io
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openblip.data.batches import ImageTextBatch, stable_id
from openblip.data.pairs import PairStream
from openblip.data.position import Position, deal_anew, start_positions
from openblip.data.samples import Caption, Sample
from openblip.data.sinks import ShardWriter
from openblip.data.sources import WeightedData
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


def stream(folder: Path, batch_size: int = 2, **options: Any) -> PairStream:
    values = {"seed": 0, "max_tokens": 12, "batch_size": batch_size} | options
    transform = values.pop("transform", TrainTransform(16, 0.5, num_ops=0))
    return PairStream([folder], TOKENIZER, transform, **values)


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


@pytest.mark.parametrize("block_size", [1, 3, 8192])
@pytest.mark.parametrize("num_shards", [1, 2, 8])
def test_an_epoch_has_every_pair_once_and_the_next_another_order(
    tmp_path: Path, block_size: int, num_shards: int
) -> None:
    folder = write(tmp_path, *(samples(WORDS[i::num_shards]) for i in range(num_shards)))
    read = texts(take(stream(folder, block_size=block_size), 12))
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
    for _ in range(3):
        read = texts(take(pairs, 1))
        assert sorted(read) == WORDS[:3]
    # The bad ones of an epoch may stand behind its last good one, and count in the next batch.
    assert pairs.position.problems.keys() == {"not_an_image", "empty"}
    assert all(2 <= count <= 3 for count in pairs.position.problems.values())


@pytest.mark.parametrize("reason", ["missing_image", "not_an_image"])
def test_too_many_bad_samples_stop_the_stream(tmp_path: Path, reason: str) -> None:
    lines = [{"image_base64": base64.b64encode(jpeg()).decode(), "caption": "ant"}] * 700
    bad = {"caption": "bee"} | ({} if reason == "missing_image" else {"image_base64": "AAAA"})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *[bad] * 350]))
    take(stream(path, max_bad_fraction=0.5), 600)
    message = rf"of {path} cannot be used, more than max_bad_fraction 0.2 allows: .*{reason}"
    with pytest.raises(ValueError, match=message):
        take(stream(path, max_bad_fraction=0.2), 600)


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


def many_samples(num: int) -> list[Sample]:
    return [Sample(f"k{i}", jpeg(i), (Caption(WORDS[i % 8]),)) for i in range(num)]


def many(tmp_path: Path, num: int, *, num_shards: int = 3) -> Path:
    """Write samples of one or two captions, some of which cannot be used."""
    every = [
        Sample(f"k{i}", b"no image" if i % 7 == 3 else jpeg(i), tuple(map(Caption, caps)))
        for i in range(num)
        for caps in [(f"{WORDS[i % 8]} {WORDS[i // 8]}", "ant")[: 1 + i % 2]]
    ]
    return write(tmp_path, *(every[i::num_shards] for i in range(num_shards)))


def same(first: ImageTextBatch, second: ImageTextBatch) -> bool:
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.token_ids, second.token_ids)
        and torch.equal(first.image_ids, second.image_ids)
    )


@pytest.mark.parametrize("block_size", [5, 8192])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_stream_goes_on_where_it_stood_to_the_bit(
    tmp_path: Path, block_size: int, num_workers: int
) -> None:
    folder = many(tmp_path, 40)
    whole = stream(folder, 3, block_size=block_size)
    batches, positions = [], []
    for batch in itertools.islice(iter(whole), 50):
        batches.append(batch)
        positions.append(whole.position)
    for start in (0, 1, 7, 12, 13, 30):
        position = Position.from_json(json.loads(json.dumps(positions[start].to_json())))
        rest = stream(folder, 3, block_size=block_size, num_workers=num_workers, position=position)
        for place, batch in enumerate(itertools.islice(iter(rest), 8), start=start + 1):
            assert same(batch, batches[place])
            assert rest.position == positions[place]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 5), (4, 3), (3, 3)])
@pytest.mark.parametrize("num_shards", [1, 20])
def test_another_number_of_ranks_reads_every_pair_of_the_epochs_once(
    tmp_path: Path, before: int, after: int, num_shards: int
) -> None:
    words = [f"{a} {b}" for a in WORDS for b in WORDS]
    every = [Sample(text, jpeg(), (Caption(text),)) for text in words]
    folder = write(tmp_path, *(every[i::num_shards] for i in range(num_shards)))
    units = 4 if num_shards == 1 else 20
    read: Counter[str] = Counter()

    def run(position: Position, num_batches: int) -> Position:
        """Take some batches, and go on until nothing of the first two epochs is left."""
        part = stream(folder, 1, block_size=7, position=position)
        for number, batch in enumerate(part, start=1):
            read.update(texts([batch]))
            [block, *others] = part.position.blocks
            is_beyond = block.ranges[0][0] >= 2 * units and not others
            if number == num_batches or (not num_batches and is_beyond):
                return part.position
        raise AssertionError

    positions = [run(position, 5 + rank) for rank, position in enumerate(start_positions(before))]
    positions = [run(position, 4) for position in deal_anew(positions, after)]
    for position in positions:
        run(position, 0)
    assert set(read) == set(words)
    # Of the third epoch each rank has read as little as one pair, at most, for the one condition.
    assert min(read.values()) == 2
    assert sum(read.values()) <= 2 * len(words) + after


def test_ranks_share_an_epoch(tmp_path: Path) -> None:
    words = [f"{a} {b}" for a in WORDS for b in WORDS]
    folder = write(tmp_path, [Sample(text, jpeg(), (Caption(text),)) for text in words])
    read = [
        text
        for position in start_positions(4)
        for text in texts(take(stream(folder, 1, position=position), 16))
    ]
    assert sorted(read) == sorted(words)


def test_the_same_number_of_ranks_changes_nothing() -> None:
    positions = [replace(position, num_seen=3) for position in start_positions(2)]
    assert deal_anew(positions, 2) == positions


def test_problems_are_counted_on(tmp_path: Path) -> None:
    positions = [
        replace(position, num_seen=10 + rank, problems={"empty": 1 + rank})
        for rank, position in enumerate(start_positions(2))
    ]
    first, *others = deal_anew(positions, 3)
    assert (first.num_seen, first.problems) == (21, {"empty": 3})
    assert all((p.num_seen, p.problems) == (0, {}) for p in others)


def test_data_that_have_changed_do_not_go_on(tmp_path: Path) -> None:
    folder = write(tmp_path, *([sample] for sample in many_samples(20)))
    before = stream(folder)
    take(before, 2)
    (folder / "3.tar").unlink()
    with pytest.raises(ValueError, match="an epoch had 20 units and has 19"):
        take(stream(folder, position=before.position), 1)


def test_the_first_bad_samples_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [Sample(f"bad{i}", b"no image", (Caption("elk"),)) for i in range(9)]
    folder = write(tmp_path, [*samples(WORDS[:1]), *bad])
    part = stream(folder, 1)
    take(part, 3)
    named = [record.message for record in caplog.records]
    assert len(named) == 5
    assert all("bad" in text and "not_an_image" in text for text in named)
    assert part.position.problems["not_an_image"] > 5


def mixture(tmp_path: Path, **options: Any) -> PairStream:
    """Three sources of 10, 5 and 3 pairs, of which two have weights."""
    words = [f"{a} {b}" for a in WORDS[:3] for b in WORDS[:6]]
    parts = {"a": words[:10], "b": words[10:15], "c": words[15:]}
    for name, texts_of_it in parts.items():
        if not (tmp_path / name).exists():
            write(tmp_path / name, samples(texts_of_it))
    data = [
        WeightedData(str(tmp_path / "a"), 2.0),
        tmp_path / "b",
        WeightedData(str(tmp_path / "c"), 0.5),
    ]
    values = {"seed": 0, "max_tokens": 12, "batch_size": 5} | options
    return PairStream(data, TOKENIZER, TrainTransform(16, 0.5, num_ops=0), **values)


def test_each_source_gives_its_share_and_its_pairs_in_epochs(tmp_path: Path) -> None:
    read = texts(take(mixture(tmp_path, block_size=9), 28))
    source_of = ["a"] * 10 + ["b"] * 5 + ["c"] * 3
    words = [f"{a} {b}" for a in WORDS[:3] for b in WORDS[:6]]
    by_source: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    for num, text in enumerate(read, start=1):
        by_source[source_of[words.index(text)]].append(text)
        for name, share in (("a", 4 / 7), ("b", 2 / 7), ("c", 1 / 7)):
            assert abs(len(by_source[name]) - share * num) < 1.5
    assert {name: len(several) for name, several in by_source.items()} == {
        "a": 80,
        "b": 40,
        "c": 20,
    }
    for name, size in (("a", 10), ("b", 5), ("c", 3)):
        several = by_source[name]
        for start in range(0, len(several) - size + 1, size):
            assert len(set(several[start : start + size])) == size


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_mixture_goes_on_where_it_stood_to_the_bit(tmp_path: Path, num_workers: int) -> None:
    whole = mixture(tmp_path, block_size=9)
    batches, positions = [], []
    for batch in itertools.islice(iter(whole), 20):
        batches.append(batch)
        positions.append(whole.position)
    for start in (0, 3, 11):
        position = Position.from_json(json.loads(json.dumps(positions[start].to_json())))
        assert position == positions[start]
        rest = mixture(tmp_path, block_size=9, num_workers=num_workers, position=position)
        for place, batch in enumerate(itertools.islice(iter(rest), 8), start=start + 1):
            assert same(batch, batches[place])
            assert rest.position == positions[place]


def test_a_mixture_is_dealt_anew_source_by_source(tmp_path: Path) -> None:
    parts = [mixture(tmp_path, block_size=9, position=p) for p in start_positions(2)]
    for part in parts:
        take(part, 3)
    positions = [part.position for part in parts]
    dealt = deal_anew(positions, 3)
    for source in range(3):
        alone = deal_anew([position.sources[source] for position in positions], 3)
        assert [position.sources[source] for position in dealt] == alone
    assert sum(position.num_seen for position in dealt) == 30
    read: Counter[str] = Counter()
    for position in dealt:
        read.update(texts(take(mixture(tmp_path, block_size=9, position=position), 12)))
    assert len(read) == 18


def test_ranks_share_each_source_of_a_mixture(tmp_path: Path) -> None:
    """With shares as the sizes are, an epoch of all ranks ends in all sources at once."""
    for name, words in (("a", WORDS[:4]), ("b", WORDS[4:])):
        write(tmp_path / name, samples(words))
    data = [WeightedData(str(tmp_path / "a")), WeightedData(str(tmp_path / "b"))]
    transform = TrainTransform(16, 0.5, num_ops=0)
    read = [
        text
        for position in start_positions(4)
        for text in texts(
            take(
                PairStream(
                    data, TOKENIZER, transform, batch_size=2, max_tokens=12, seed=0,
                    position=position,
                ),
                1,
            )
        )
    ]  # fmt: skip
    assert sorted(read) == WORDS


def test_weights_that_come_or_go_are_other_data(tmp_path: Path) -> None:
    weighted = mixture(tmp_path)
    take(weighted, 1)
    with pytest.raises(ValueError, match="they had weights"):
        take(stream(tmp_path / "a", position=weighted.position), 1)
    with pytest.raises(ValueError, match="there were 3 sources and are 1"):
        take(
            PairStream(
                [WeightedData(str(tmp_path / "a"))], TOKENIZER, TrainTransform(16, 0.5),
                batch_size=2, max_tokens=12, seed=0, position=weighted.position,
            ),
            1,
        )  # fmt: skip


def test_a_source_without_a_usable_pair_is_named(tmp_path: Path) -> None:
    write(tmp_path / "c", [Sample("x", jpeg())])
    with pytest.raises(ValueError, match=r"no usable image-text pair in .*/c: no image has"):
        take(mixture(tmp_path), 10)


def test_one_caption_of_an_image_is_drawn_in_every_epoch(tmp_path: Path) -> None:
    captions = [tuple(Caption(f"{word} {other}") for other in WORDS) for word in WORDS[:4]]
    folder = write(
        tmp_path, [Sample(f"k{i}", jpeg(), several) for i, several in enumerate(captions)]
    )
    whole = stream(folder, 4, captions="one")
    batches, positions = [], []
    for batch in itertools.islice(iter(whole), 6):
        batches.append(batch)
        positions.append(whole.position)
    for batch in batches:
        assert sorted(text.split()[0] for text in texts([batch])) == WORDS[:4]
    assert len(set(texts(batches))) > 12
    assert whole.count_pairs(100) == (4, False)
    rest = stream(folder, 4, captions="one", num_workers=3, position=positions[2])
    assert all(same(a, b) for a, b in zip(take(rest, 3), batches[3:], strict=True))
