"""Samples into files of the kinds that a user may want, each read back as it was: `open_writer`.

tar      `data.sinks.ShardWriter`
parquet  a row per sample: `key`, `image` as the datasets library stores it, `image_extension`,
         `captions` as a list of structs, and `meta`, a JSON text of all further fields
jsonl    a line per sample, with the same fields; the image is text, `image_base64`
files    a folder in img2dataset's layout: KEY.EXT, KEY.txt with the kept captions, one a line,
         and KEY.json with all captions as they were judged, and the meta fields
"""

import base64
import contextlib
import errno
import json
from pathlib import Path
from typing import IO, Any, Literal

from openblip.data.samples import Sample
from openblip.data.sinks import (
    SampleWriter,
    ShardWriter,
    description_of,
    json_line,
    whole_folder,
)

OutputKind = Literal["tar", "parquet", "jsonl", "files"]

ROWS_PER_GROUP = 256
BYTES_PER_GROUP = 1 << 26
"""Of images that wait for their group to be written, whatever their number."""


def open_writer(path: Path, kind: OutputKind) -> SampleWriter:
    """Return a writer of samples, to be used as a context: `path` appears on a clean exit alone.

    path   ends in `output_suffix(kind)`, or it is not known again as what it is
    An earlier file is replaced, and so is an earlier folder of the kind `files`.
    On entering, raises ValueError for a folder that is not of that kind (`whole_folder`).
    """
    match kind:
        case "tar":
            return ShardWriter(path)
        case "parquet":
            return ParquetWriter(path)
        case "jsonl":
            return JsonLinesWriter(path)
        case "files":
            return FolderWriter(path)


def output_suffix(kind: OutputKind) -> str:
    """Return the ending of a file of this kind; of a folder it is empty."""
    return "" if kind == "files" else f".{kind}"


class ParquetWriter(SampleWriter):
    """A parquet file, in groups of rows that are small enough to be held."""

    def _open(self, temporary: Path, stack: contextlib.ExitStack) -> None:
        # Slow to import, and few need it.
        import pyarrow
        from pyarrow import parquet

        text, real = pyarrow.string(), pyarrow.float64()
        self._captions = pyarrow.list_(
            pyarrow.struct(
                [
                    ("text", text),
                    ("source", text),
                    ("match_probability", real),
                    ("similarity", real),
                    ("mean_log_probability", real),
                    ("model", text),
                    ("decoding", text),  # JSON: its fields are those of the method
                    ("seed", pyarrow.int64()),
                    ("filter_model", text),
                    ("drop_reason", text),
                    ("match_probabilities", pyarrow.list_(real)),
                    ("prompt", text),
                ]
            )
        )
        image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
        # By this the datasets library knows that the column holds images.
        features = {"info": {"features": {"image": {"_type": "Image"}}}}
        self._schema = pyarrow.schema(
            [
                ("key", text),
                ("image", image),
                ("image_extension", text),
                ("captions", self._captions),
                ("meta", text),
            ],
            metadata={"huggingface": json.dumps(features)},
        )
        self._arrow = pyarrow
        # A dictionary of images, which differ, would be built in vain.
        self._file = stack.enter_context(
            parquet.ParquetWriter(temporary, self._schema, use_dictionary=False)
        )
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0
        # It comes first when the stack is left, while the file is open.
        stack.push(lambda kind, *_: self._write_group() if kind is None else None)

    def _append(self, sample: Sample) -> None:
        captions = [caption.to_json() for caption in sample.captions]
        for caption in captions:
            if "decoding" in caption:
                caption["decoding"] = json_line(caption["decoding"]).decode()
        row = {
            "key": sample.key,
            "image": {
                "bytes": sample.image_bytes,
                "path": f"{sample.key}.{sample.image_extension}",
            },
            "image_extension": sample.image_extension,
            "captions": captions,
            "meta": json_line(dict(sample.meta)).decode(),
        }
        try:
            # Here the sample that cannot be written is still known.
            self._arrow.array([captions], self._captions)
            self._arrow.array([sample.key], self._schema.field("key").type)
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"sample {sample.key!r} cannot be written: {error}") from error
        self._rows.append(row)
        self._num_bytes += len(sample.image_bytes)
        if len(self._rows) == ROWS_PER_GROUP or self._num_bytes >= BYTES_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        if self._rows:
            self._file.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._rows, self._num_bytes = [], 0


class JsonLinesWriter(SampleWriter):
    """A JSONL file. The image, long and unreadable, is the last field of its line."""

    _file: IO[bytes]

    def _open(self, temporary: Path, stack: contextlib.ExitStack) -> None:
        self._file = stack.enter_context(temporary.open("wb"))

    def _append(self, sample: Sample) -> None:
        line = {
            "key": sample.key,
            "image_extension": sample.image_extension,
            "captions": [caption.to_json() for caption in sample.captions],
            "meta": dict(sample.meta),
            "image_base64": base64.b64encode(sample.image_bytes).decode(),
        }
        self._file.write(json_line(line) + b"\n")


class FolderWriter(SampleWriter):
    """A folder of loose files. A slash in a key makes a subfolder.

    `write` also raises ValueError for a key that came before or that is no path, as `/a` or `a//b`.
    """

    def _whole(self, path: Path) -> contextlib.AbstractContextManager[Path]:
        return whole_folder(path)

    def _open(self, temporary: Path, stack: contextlib.ExitStack) -> None:
        self._folder = temporary

    def _append(self, sample: Sample) -> None:
        if not all(sample.key.split("/")):
            raise ValueError(
                f"key {sample.key!r} cannot be a path in a folder: it begins or ends with a slash, "
                "or has two side by side; the other kinds of output take it"
            )
        description = json_line(description_of(sample)) + b"\n"
        kept = [" ".join(c.text.split()) for c in sample.captions if c.drop_reason is None]
        text = "".join(f"{line}\n" for line in kept if line)
        # The extensions stand behind the only dot, so that `with_suffix` is not needed.
        stem = str(self._folder / sample.key)
        try:
            Path(stem).parent.mkdir(parents=True, exist_ok=True)
            # The .json tells of a key that came before, with an image of any extension.
            with open(f"{stem}.json", "xb") as file:
                file.write(description)
            Path(f"{stem}.{sample.image_extension}").write_bytes(sample.image_bytes)
            if text:  # a training would take an empty file for an empty caption
                Path(f"{stem}.txt").write_bytes(text.encode(errors="replace"))
        except FileExistsError as error:
            raise ValueError(f"key {sample.key!r} comes twice: one would be lost") from error
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise ValueError(f"key {sample.key!r} is too long for a file name") from error
