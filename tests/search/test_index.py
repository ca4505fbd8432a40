"""An index: what is added is there once, whatever happens to whoever adds it."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from openblip.data.samples import Sample
from openblip.data.sinks import ShardWriter, whole_folder
from openblip.data.writers import JsonLinesWriter
from openblip.search.index import INDEX_FILE, SEGMENTS, Index
from openblip.search.places import UnreadableImageError
from openblip.search.writer import IndexWriter


def vectors_of(index: Index) -> torch.Tensor:
    return torch.cat([vectors for _, vectors in index.blocks()])


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "jsonl"])
def test_every_kind_of_data_is_indexed_and_read_back(
    kind, source, add, pictures, engine, tmp_path
) -> None:
    report = add(source(kind), tmp_path / "index", commit_images=4, batch_size=2)
    assert (report.num_added, report.num_images, report.bad) == (12, 12, {})
    index = Index.open(tmp_path / "index")
    assert len(index) == index.num_rows == 12
    assert len(index.state.segments) == 3
    expected = F.normalize(engine.embed_images(list(pictures.values())), dim=1)
    for key, data in pictures.items():
        number = index.find(key)
        assert index.key(number) == key
        assert index.image_bytes(number) == data
        metadata = index.metadata(number)
        assert metadata["captions"][0]["text"] == f"caption of {key}"
        assert metadata["number"] == int(key[-2:])
        assert (metadata["width"], metadata["height"]) == (48, 48)
        torch.testing.assert_close(
            index.embeddings([number])[0], expected[metadata["number"]], atol=1e-5, rtol=0
        )


def test_the_nearest_are_those_of_a_plain_comparison(source, add, tmp_path) -> None:
    add(source("folder"), tmp_path / "index", commit_images=5)
    index = Index.open(tmp_path / "index")
    query = F.normalize(torch.randn(8, generator=torch.Generator().manual_seed(1)), dim=0)
    expected = (vectors_of(index) @ query).sort(descending=True)
    numbers, cosines = index.top(query, 7)
    assert numbers == expected.indices[:7].tolist()
    assert cosines == pytest.approx(expected.values[:7].tolist())
    allowed = np.arange(12) % 2 == 0
    numbers, _ = index.top(query, 12, allowed)
    assert numbers == [number for number in expected.indices.tolist() if number % 2 == 0]


def test_what_is_there_is_left_alone_and_what_changed_is_replaced(
    source, add, pictures, tmp_path
) -> None:
    folder, path = source("folder"), tmp_path / "index"
    add(folder, path)
    before = Index.open(path).state
    again = add(folder, path)
    assert (again.num_added, again.num_unchanged) == (0, 12)
    assert Index.open(path).state == before
    (folder / "picture_03.jpg").write_bytes(pictures["picture_04"])
    (folder / "new.jpg").write_bytes(pictures["picture_05"])
    changed = add(folder, path)
    assert (changed.num_added, changed.num_replaced, changed.num_unchanged) == (1, 1, 11)
    index = Index.open(path)
    assert len(index) == 13
    assert index.image_bytes(index.find("picture_03")) == pictures["picture_04"]
    assert sorted(index.known()) == sorted([*pictures, "new"])


def test_pruning_deletes_what_the_source_has_no_more(source, add, tmp_path) -> None:
    folder, path = source("folder"), tmp_path / "index"
    add(folder, path)
    (folder / "picture_03.jpg").unlink()
    assert add(folder, path).num_pruned == 0
    assert add(folder, path, is_pruned=True).num_pruned == 1
    assert "picture_03" not in Index.open(path).known()


def test_pruning_spares_what_could_not_be_read_and_finds_shards_that_are_gone(
    source, add, pictures, tmp_path
) -> None:
    folder, path = tmp_path / "shards", tmp_path / "index"
    folder.mkdir()
    for name, start in (("a", 0), ("b", 6)):
        with ShardWriter(folder / f"{name}.tar") as writer:
            for key, data in list(pictures.items())[start : start + 6]:
                writer.write(Sample(key, data))
    add(folder, path)
    (folder / "b.tar").unlink()
    assert add(folder, path, is_pruned=True).num_pruned == 6
    assert sorted(Index.open(path).known()) == sorted(pictures)[:6]
    loose = source("folder")
    add(loose, tmp_path / "other")
    (loose / "picture_03.jpg").write_bytes(b"broken")
    report = add(loose, tmp_path / "other", is_pruned=True)
    assert (report.num_pruned, report.num_images) == (0, 12)


def test_new_captions_are_taken_up(source, add, tmp_path) -> None:
    folder, path = source("folder"), tmp_path / "index"
    add(folder, path)
    fields = json.loads((folder / "picture_03.json").read_text())
    (folder / "picture_03.json").write_text(json.dumps({**fields, "captions": ["a new one"]}))
    report = add(folder, path)
    assert (report.num_replaced, report.num_unchanged) == (1, 11)
    index = Index.open(path)
    assert index.metadata(index.find("picture_03"))["captions"][0]["text"] == "a new one"


@pytest.mark.parametrize("kind", ["folder", "tar", "jsonl"])
def test_bytes_that_changed_are_not_taken_for_the_image(
    kind, source, add, pictures, tmp_path
) -> None:
    path = source(kind)
    add(path, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    number = index.find("picture_03")
    assert index.image_bytes(number) == pictures["picture_03"]
    if kind == "folder":
        (path / "picture_03.jpg").write_bytes(pictures["picture_04"])
    else:
        writer = ShardWriter(path) if kind == "tar" else JsonLinesWriter(path)
        with writer:
            for key, data in reversed(pictures.items()):
                writer.write(Sample(key, data if key != "picture_03" else pictures["picture_05"]))
    with pytest.raises(UnreadableImageError, match="or has changed"):
        index.image_bytes(number)


def test_states_of_some_images_outlive_compaction(source, add, pictures, tmp_path) -> None:
    path, folder = tmp_path / "index", source("folder")
    add(folder, path, has_states=True)
    (folder / "new.jpg").write_bytes(pictures["picture_05"][:-2] + b"\xff\xd9")
    (folder / "other.png").write_bytes(pictures["picture_06"])
    add(folder, path)
    with IndexWriter.of(path) as writer:
        before = writer.index.states(writer.index.find("picture_04"))
        writer.compact()
        index = writer.index
        after = index.states(index.find("picture_04"))
        assert index.states(index.find("other")) is None
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    assert len(index) == 14
    assert index.image_bytes(index.find("picture_07")) == pictures["picture_07"]


def test_damage_is_found(source, add, tmp_path) -> None:
    path = tmp_path / "index"
    add(source("folder"), path, commit_images=6, batch_size=6)
    index = Index.open(path)
    assert index.damaged() == []
    file = path / SEGMENTS / "000002" / "embeddings.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert index.damaged() == ["000002"]


def test_bad_images_are_counted_and_kept_out(source, add, tmp_path) -> None:
    folder = source("folder")
    (folder / "picture_03.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (folder / "empty.png").write_bytes(b"")
    told: list[tuple[str, str]] = []
    report = add(folder, tmp_path / "index", on_bad=lambda key, reason: told.append((key, reason)))
    assert report.num_added == 11
    assert sum(report.bad.values()) == len(told) == 2
    assert {key for key, _ in told} == {"picture_03", "empty"}


def test_a_key_of_two_shards_is_refused_while_both_are_there(
    source, add, pictures, tmp_path
) -> None:
    path = tmp_path / "index"
    folder = source("folder")
    add(folder, path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "picture_00.jpg").write_bytes(pictures["picture_01"])
    assert add(other, path).bad == {"repeated_key": 1}
    # What was moved is the same image at another place.
    folder.rename(tmp_path / "moved")
    moved = add(tmp_path / "moved", path)
    assert (moved.num_replaced, moved.num_images) == (12, 12)
    index = Index.open(path)
    assert index.image_bytes(index.find("picture_00")) == pictures["picture_00"]


def test_deleted_images_are_found_no_more_and_compacting_gives_their_room_back(
    source, add, pictures, tmp_path
) -> None:
    path = tmp_path / "index"
    add(source("tar"), path, commit_images=4)
    with IndexWriter.of(path) as writer:
        writer.delete([writer.index.find("picture_02"), writer.index.find("picture_07")])
        assert len(writer.index) == 10
        assert writer.index.num_rows == 12
    index = Index.open(path)
    with pytest.raises(ValueError, match="no image 'picture_02'"):
        index.find("picture_02")
    embedded = vectors_of(index)[index.is_live]
    with IndexWriter.of(path) as writer:
        writer.compact()
    compacted = Index.open(path)
    assert (len(compacted), compacted.num_rows, len(compacted.state.segments)) == (10, 10, 1)
    assert torch.equal(vectors_of(compacted), embedded)
    assert [p.name for p in (path / SEGMENTS).iterdir()] == [compacted.state.segments[0].name]
    for key in compacted.known():
        assert compacted.image_bytes(compacted.find(key)) == pictures[key]


def test_indexes_of_one_model_are_merged(source, add, pictures, tmp_path) -> None:
    add(source("tar"), tmp_path / "one")
    other = tmp_path / "more"
    other.mkdir()
    (other / "more.jpg").write_bytes(pictures["picture_00"])
    (other / "picture_01.jpg").write_bytes(pictures["picture_05"])
    add(other, tmp_path / "two")
    with IndexWriter.of(tmp_path / "one") as writer:
        assert writer.merge(Index.open(tmp_path / "two")) == 1
    index = Index.open(tmp_path / "one")
    assert len(index) == 13
    assert index.image_bytes(index.find("picture_01")) == pictures["picture_01"]
    state = json.loads((tmp_path / "two" / INDEX_FILE).read_text())
    (tmp_path / "two" / INDEX_FILE).write_text(json.dumps({**state, "model_id": "another"}))
    with (
        IndexWriter.of(tmp_path / "one") as writer,
        pytest.raises(ValueError, match=r"made with tiny \(another\)"),
    ):
        writer.merge(Index.open(tmp_path / "two"))


def test_what_was_not_committed_is_not_there(source, add, tmp_path) -> None:
    path = tmp_path / "index"
    add(source("folder"), path)
    before = Index.open(path)
    # A writer that was killed before its commit, and one killed within a segment.
    with whole_folder(path / SEGMENTS / "000002") as folder:
        (folder / "embeddings.npy").write_bytes(b"half")
    (path / SEGMENTS / ".000003.77.tmp").mkdir()
    assert len(Index.open(path)) == len(before)
    with IndexWriter.of(path):
        pass
    assert [p.name for p in (path / SEGMENTS).iterdir()] == ["000001"]


def test_a_reader_sees_what_was_committed_when_it_asks(source, add, pictures, tmp_path) -> None:
    path = tmp_path / "index"
    folder = source("folder")
    add(folder, path)
    reader = Index.open(path)
    assert not reader.refresh()
    (folder / "new.jpg").write_bytes(pictures["picture_05"])
    add(folder, path)
    assert len(reader) == 12
    assert reader.refresh()
    assert len(reader) == 13
    old = Index.open(path)
    with IndexWriter.of(path) as writer:
        writer.compact()
    # Its segments are gone from the folder, and still there for who has them open.
    assert len(vectors_of(old)) == 13
    assert old.refresh()


def test_one_writer_at_a_time(source, add, tmp_path) -> None:
    path = tmp_path / "index"
    folder = source("folder")
    add(folder, path)
    with IndexWriter.of(path), pytest.raises(ValueError, match="another process writes"):
        add(folder, path)
    add(folder, path)


def test_another_model_is_refused(source, add, tmp_path) -> None:
    path = tmp_path / "index"
    add(source("folder"), path)
    with (
        pytest.raises(ValueError, match="embeds images elsewhere"),
        IndexWriter(path, model="other", model_id="other", embedding_width=8),
    ):
        pass


def test_a_folder_of_other_things_is_no_index(tmp_path) -> None:
    with pytest.raises(ValueError, match="is no index"):
        Index.open(tmp_path)
    (tmp_path / "letter.txt").touch()
    with (
        pytest.raises(ValueError, match=r"is not empty: it holds letter\.txt"),
        IndexWriter(tmp_path, model="tiny", model_id="x", embedding_width=8),
    ):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letter.txt"]


def test_an_index_that_lacks_a_segment_says_so(source, add, tmp_path) -> None:
    path = tmp_path / "index"
    add(source("folder"), path)
    (path / SEGMENTS / "000001" / "embeddings.npy").unlink()
    with pytest.raises(ValueError, match=r"lacks .*embeddings\.npy"):
        Index.open(path)


def test_an_image_that_is_gone_is_told(source, add, tmp_path) -> None:
    folder = source("folder")
    add(folder, tmp_path / "index")
    (folder / "picture_00.jpg").unlink()
    index = Index.open(tmp_path / "index")
    with pytest.raises(UnreadableImageError, match="picture_00 is no longer in"):
        index.image_bytes(index.find("picture_00"))


def test_many_small_additions_become_one_segment(add, pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("openblip.search.add.SMALL_SEGMENTS", 3)
    folder = tmp_path / "folder"
    folder.mkdir()
    for key, data in list(pictures.items())[:5]:
        (folder / f"{key}.jpg").write_bytes(data)
        add(folder, tmp_path / "index")
    index = Index.open(tmp_path / "index")
    assert len(index) == 5
    assert len(index.state.segments) < 5


def test_states_are_kept_when_asked_for(source, add, engine, pictures, tmp_path) -> None:
    add(source("folder"), tmp_path / "index", has_states=True, batch_size=5)
    index = Index.open(tmp_path / "index")
    stored = index.states(index.find("picture_04"))
    assert stored is not None
    expected = engine.encode([pictures["picture_04"]]).states[0]
    torch.testing.assert_close(stored.float(), expected, atol=2e-3, rtol=2e-3)
    with IndexWriter.of(tmp_path / "index") as writer:
        writer.delete([0])
        writer.compact()
        kept = writer.index.states(writer.index.find("picture_04"))
    assert kept is not None
    assert torch.equal(kept, stored)


def test_a_broken_tar_is_found_up_to_the_break(add, pictures, tmp_path) -> None:
    path = tmp_path / "shard.tar"
    with ShardWriter(path) as writer:
        for key, data in pictures.items():
            writer.write(Sample(key, data))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    report = add(path, tmp_path / "index")
    assert 0 < report.num_added < 12
    assert report.bad == {"truncated_tar": 1}
    index = Index.open(tmp_path / "index")
    for key in index.known():
        assert index.image_bytes(index.find(key)) == pictures[key]
