"""Files that a user names: found in folders, read one by one and prepared in batches.

Letters: B images, S image side in pixels.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from openblip.data.prefetch import map_beside
from openblip.images import ImageDecodeError, decode_image, eval_transform

MAX_FILE_BYTES = 1 << 30
"""More is no photo: a film among the photos must not fill the memory."""

OnBadFile = Callable[[Path, str], None]


def list_files(paths: Sequence[Path], *, on_bad: OnBadFile) -> list[Path]:
    """Return the files of the paths, in order: a file itself, of a folder all that is within.

    Links to folders within a folder are not followed.
    on_bad   called with each folder that cannot be opened, and the reason
    Raises ValueError for a path that does not exist, and if there is no file.
    """
    absent = [str(path) for path in paths if not path.exists()]
    if absent:
        raise ValueError(f"no file or folder at {', '.join(absent)}")

    def on_error(error: OSError) -> None:
        on_bad(Path(error.filename), f"unreadable: {error.strerror}")

    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        for folder, subfolders, names in os.walk(path, onerror=on_error):
            subfolders.sort()
            files += [Path(folder, name) for name in sorted(names)]
    if not files:
        raise ValueError(f"no file in {', '.join(map(str, paths))}")
    return files


def read_batches(
    files: Sequence[Path], size_px: int, batch_size: int, *, on_bad: OnBadFile
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yield images (B, 3, S, S), B up to `batch_size`, with their paths.

    Files are read and decoded by threads, a few dozen ahead of what is done with the batches.
    on_bad   called with each file that is no usable image, and the reason, in the files' order
    """

    def read(path: Path) -> Tensor | str:
        try:
            return _read(path, size_px)
        except ImageDecodeError as error:
            return str(error)
        except OSError as error:
            return f"unreadable: {error.strerror}"

    paths: list[Path] = []
    images: list[Tensor] = []
    for path, image in zip(files, map_beside(read, files), strict=True):
        if isinstance(image, str):
            on_bad(path, image)
            continue
        paths.append(path)
        images.append(image)
        if len(paths) == batch_size:
            yield paths, torch.stack(images)
            paths, images = [], []
    if paths:
        yield paths, torch.stack(images)


def _read(path: Path, size_px: int) -> Tensor:
    # A pipe would wait for a writer.
    if not path.is_file():
        raise ImageDecodeError("not_a_file", "a link to nothing, a pipe or a device")
    num_bytes = path.stat().st_size
    if num_bytes > MAX_FILE_BYTES:
        raise ImageDecodeError("too_many_bytes", f"{num_bytes} > {MAX_FILE_BYTES}")
    return eval_transform(decode_image(path.read_bytes()), size_px)


def prepare_image(data: bytes, path: Path, size_px: int) -> Tensor:
    """Prepare what the file at `path` holds -> (3, S, S). Raises ValueError naming a bad one."""
    try:
        return eval_transform(decode_image(data), size_px)
    except ImageDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
