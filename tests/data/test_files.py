from pathlib import Path

import pytest
from PIL import Image

import openblip.data.files
from openblip.data.files import list_files, read_batches


def ignore(path: Path, reason: str) -> None:
    raise AssertionError((path, reason))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    for name in ("b/2.png", "a.png", "b/1.png"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / name)
    return tmp_path


def test_files_come_in_one_order_and_as_they_were_named(folder: Path) -> None:
    names = ["a.png", "b/1.png", "b/2.png"]
    assert list_files([folder], on_bad=ignore) == [folder / name for name in names]
    again = list_files([folder / "b" / "2.png", folder / "b"], on_bad=ignore)
    assert again == [folder / "b" / name for name in ("2.png", "1.png", "2.png")]


def test_paths_without_files_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no file or folder at .*gone, .*lost"):
        list_files([folder, folder / "gone", folder / "lost"], on_bad=ignore)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="no file in"):
        list_files([folder / "empty"], on_bad=ignore)


def test_batches_are_read_one_at_a_time(folder: Path) -> None:
    files = list_files([folder], on_bad=ignore)
    batches = read_batches(files, 16, 2, on_bad=ignore)
    paths, images = next(batches)
    assert paths == files[:2]
    assert images.shape == (2, 3, 16, 16)
    # What has not been asked for has not been read.
    files[2].unlink()
    bad: list[Path] = []
    rest = read_batches(files, 16, 2, on_bad=lambda path, reason: bad.append(path))
    assert [paths for paths, _ in rest] == [files[:2]]
    assert bad == [files[2]]


def test_a_film_does_not_fill_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openblip.data.files, "MAX_FILE_BYTES", 10)
    bad: dict[Path, str] = {}
    assert not list(read_batches([folder / "a.png"], 16, 2, on_bad=bad.__setitem__))
    assert bad[folder / "a.png"].startswith("too_many_bytes")
