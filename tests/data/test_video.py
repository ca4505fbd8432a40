"""Frames of folders and files, and the public files of captions of videos."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from openblip.data.video import (
    VideoText,
    find_video,
    read_frames,
    read_video_texts,
    uniform_frames,
)
from openblip.images import eval_transform


def shade(level: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (level, level, level))


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "videos" / "video7"
    folder.mkdir(parents=True)
    for number in range(12):
        shade(number * 20).save(folder / f"frame{number}.png")
    (folder / "notes.txt").write_text("no frame")
    return folder


def test_frames_lie_at_equal_distances() -> None:
    assert uniform_frames(100, 8) == [0, 12, 24, 36, 48, 60, 72, 84]
    assert uniform_frames(3, 8) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert uniform_frames(5, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="without frames"):
        uniform_frames(0, 8)


def test_frame_ten_comes_behind_frame_nine(frames: Path) -> None:
    read = read_frames(frames, 4, 8)
    assert read.shape == (4, 3, 8, 8)
    for number, frame in zip((0, 3, 6, 9), read, strict=True):
        assert_close(frame, eval_transform(shade(number * 20), 8))
    assert torch.equal(read_frames(frames, 12, 8)[-1], eval_transform(shade(220), 8))


def test_what_is_no_video_is_named(frames: Path, tmp_path: Path) -> None:
    assert find_video(frames.parent, "video7") == frames
    with pytest.raises(ValueError, match="holds no video video8"):
        find_video(frames.parent, "video8")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="holds no frame"):
        read_frames(tmp_path / "void", 4, 8)
    (frames / "frame0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"frame0\.png: not_an_image"):
        read_frames(frames, 4, 8)


def test_a_missing_decoder_is_one_sentence(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"film")
    with pytest.raises(ValueError, match=r"pip install 'openblip\[video\]'") as caught:
        read_frames(tmp_path / "clip.mp4", 4, 8)
    assert "\n" not in str(caught.value)


def test_frames_of_a_file(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            container.mux(stream.encode(av.VideoFrame.from_image(shade(number * 20))))
        container.mux(stream.encode())
    read = read_frames(find_video(tmp_path, "clip"), 4, 8)
    for number, frame in zip((0, 3, 6, 9), read, strict=True):
        assert_close(frame, eval_transform(shade(number * 20), 8), atol=0.1, rtol=0)
    (tmp_path / "cut.mp4").write_bytes(b"no film at all")
    with pytest.raises(ValueError, match=r"cut\.mp4 cannot be read as a video"):
        read_frames(tmp_path / "cut.mp4", 4, 8)


def test_the_public_files_of_msrvtt(tmp_path: Path) -> None:
    expected = [VideoText("video7020", "a woman, cooking"), VideoText("video7021", "a dog")]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"clip_name": t.video, "caption": t.text}) + "\n\n" for t in expected)
    )
    (tmp_path / "b.csv").write_text(
        'key,vid_key,video_id,sentence\nret0,msr7020,video7020,"a woman, cooking"\n'
        "ret1,msr7021,video7021,a dog\n"
    )
    info = {
        "videos": [
            {"video_id": "video1", "split": "train"}, {"video_id": "video7020", "split": "test"},
            {"video_id": "video7021", "split": "test"},
        ],
        "sentences": [
            {"sen_id": number, "video_id": t.video, "caption": t.text}
            for number, t in enumerate([VideoText("video1", "of training"), *expected])
        ],
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(info))
    for name in ("a.jsonl", "b.csv", "c.json"):
        assert read_video_texts(tmp_path / name) == expected
    del info["videos"]
    (tmp_path / "c.json").write_text(json.dumps(info))
    assert len(read_video_texts(tmp_path / "c.json")) == 3


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.jsonl", '{"clip_name": "v"}\n', "row 1: expected texts clip_name and caption"),
        ("a.jsonl", "{\n", "line 1: no JSON"),
        ("a.jsonl", "", "holds no caption"),
        ("b.csv", "video,text\nv,t\n", "row 2: expected texts video_id and sentence"),
        ("c.json", "[]", "holds no `sentences`"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=problem) as caught:
        read_video_texts(tmp_path / name)
    assert name in str(caught.value)
