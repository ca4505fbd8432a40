"""Videos: frames of a folder or of a file, and MSRVTT's public annotations.

A video is a folder of images, one a frame, or a file that the library av decodes.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from openblip.data.rows import IMAGE_EXTENSIONS
from openblip.images import ImageDecodeError, decode_image, eval_transform

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".gif")


@dataclass(frozen=True)
class VideoText:
    """A caption, and the name of its video."""

    video: str
    text: str


def uniform_frames(num_frames: int, wanted: int) -> list[int]:
    """Return the numbers of `wanted` frames at equal distances, the first being 0.

    A video of fewer frames repeats them.
    Raises ValueError for a video without frames.
    Source: BLIP's video_dataset.py, whose distance is a whole number of frames; of a video with
    fewer frames than wanted it takes the first alone, this function all.
    """
    if num_frames < 1:
        raise ValueError("a video without frames")
    if num_frames < wanted:
        return [index * num_frames // wanted for index in range(wanted)]
    return [index * (num_frames // wanted) for index in range(wanted)]


def find_video(folder: Path, name: str) -> Path:
    """Return the folder of frames or the file of a video of this name.

    Raises ValueError if there is none.
    """
    candidates = [folder / name, *(folder / f"{name}{end}" for end in VIDEO_EXTENSIONS)]
    for path in candidates:
        if path.exists():
            return path
    raise ValueError(
        f"{folder} holds no video {name}: neither a folder of frames of that name nor a "
        f"{', '.join(VIDEO_EXTENSIONS)} file"
    )


def read_frames(path: Path, wanted: int, size_px: int) -> Tensor:
    """Read frames at equal distances -> (wanted, 3, S, S), prepared as images are.

    Raises ValueError naming what cannot be read, and the extra to install if a file needs it.
    """
    images = _frames_of_folder(path, wanted) if path.is_dir() else _frames_of_file(path, wanted)
    return torch.stack([eval_transform(image, size_px) for image in images])


def _frames_of_folder(folder: Path, wanted: int) -> list[Image.Image]:
    files = [file for file in folder.iterdir() if file.suffix[1:].lower() in IMAGE_EXTENSIONS]
    if not files:
        raise ValueError(f"{folder} holds no frame: expected images")
    files.sort(key=_natural)
    images = []
    for index in uniform_frames(len(files), wanted):
        try:
            images.append(decode_image(files[index].read_bytes()))
        except ImageDecodeError as error:
            raise ValueError(f"{files[index]}: {error}") from error
    return images


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort frame 10 behind frame 9."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(path.stem)
    ]


_DIGITS = re.compile(r"(\d+)")


def _frames_of_file(path: Path, wanted: int) -> list[Image.Image]:
    av = _decoder()
    try:
        with av.open(str(path)) as container:
            num_frames = sum(packet.size > 0 for packet in container.demux(video=0))
        frames, num_decoded = _decode(av, path, uniform_frames(num_frames, wanted))
        if num_decoded <= max(uniform_frames(num_frames, wanted)):
            # Fewer frames came than the file has packets of: a broken or unusual one.
            frames, _ = _decode(av, path, uniform_frames(num_decoded, wanted))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    return frames


def _decode(av: Any, path: Path, indices: Sequence[int]) -> tuple[list[Image.Image], int]:
    """Return the frames at the indices, and how many were looked at: no more than are needed."""
    found: dict[int, Image.Image] = {}
    number = 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if number in indices:
                found[number] = frame.to_image()
            number += 1
            if number > max(indices):
                break
    return [found[index] for index in indices if index in found], number


def _decoder() -> Any:
    try:
        import av  # An extra: only who reads video files needs it.
    except ImportError as error:
        raise ValueError(
            "video files are decoded by the library av: pip install 'openblip[video]', or give "
            "folders of frames"
        ) from error
    return av


def read_video_texts(path: Path) -> list[VideoText]:
    """Read captions of videos from one of the public files of MSRVTT.

    path   `.jsonl` rows of clip_name and caption (as BLIP's), `.csv` with columns video_id and
           sentence (JSFusion's 1k-A test set), or `.json` with `sentences` of video_id and caption
           (the authors' test_videodatainfo.json; of its `videos`, if they tell their split, those
           for testing)
    Raises ValueError naming the first row that is none, and if there is none at all.
    """
    try:
        texts = list(_rows(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
    if not texts:
        raise ValueError(f"{path} holds no caption of a video")
    return texts


def _rows(path: Path) -> Iterator[VideoText]:
    match path.suffix:
        case ".csv":
            with path.open(encoding="utf-8-sig", newline="") as lines:
                for number, row in enumerate(csv.DictReader(lines), start=2):
                    yield _video_text(path, number, row, "video_id", "sentence")
        case ".json":
            content = _json(path, 1, path.read_text("utf-8"))
            if not isinstance(content, dict) or not isinstance(content.get("sentences"), list):
                raise ValueError(f"{path} holds no `sentences`")
            splits = {v["video_id"]: v.get("split") for v in content.get("videos", [])}
            has_test = "test" in splits.values()
            for number, row in enumerate(content["sentences"], start=1):
                text = _video_text(path, number, row, "video_id", "caption")
                if not has_test or splits.get(text.video) == "test":
                    yield text
        case _:
            for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
                if line.strip():
                    row = _json(path, number, line)
                    yield _video_text(path, number, row, "clip_name", "caption")


def _json(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: no JSON: {error}") from error


def _video_text(path: Path, number: int, row: object, video: str, text: str) -> VideoText:
    if isinstance(row, Mapping) and isinstance(row.get(video), str):
        caption = row.get(text)
        if isinstance(caption, str):
            return VideoText(row[video], caption)
    raise ValueError(f"{path}, row {number}: expected texts {video} and {text}, got {row!r:.200}")
