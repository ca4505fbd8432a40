"""A BLIP that `onnx_export` wrote, run by onnxruntime on the processor.

Letters: B images, S image side in pixels, N patches, D width, E embedding width, R texts or rows,
L tokens, T new tokens, H heads, V vocabulary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from openblip.models.blip import BlipConfig
from openblip.models.context import Context, DecoderCache
from openblip.models.text import Role

OnnxPrecision = Literal["float32", "int8"]

MANIFEST = "onnx.json"
"""The file by which a folder is known to be an export."""
FORMAT = 1
TEXTS_AT_ONCE = 32
"""Texts, sorted by length, that are padded to one length: little of it is padding."""


@dataclass(frozen=True)
class Manifest:
    """What stands in `onnx.json`.

    precision    of the products
    files        bytes of each file
    temperature  of the ITC; None for a model that does not compare
    """

    precision: OnnxPrecision
    files: Mapping[str, int]
    temperature: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as the file holds them."""
        return {
            "format": FORMAT,
            "precision": self.precision,
            "temperature": self.temperature,
            "files": dict(self.files),
        }

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a folder's file, and see that the others are there.

        Raises ValueError naming what is absent or of another size.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} is no ONNX export: it lacks {MANIFEST}")
        try:
            values = json.loads(path.read_text("utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']}, this openblip reads {FORMAT}")
            if values["precision"] not in {"float32", "int8"}:
                raise ValueError(f"precision {values['precision']!r}, expected float32 or int8")
            manifest = cls(values["precision"], dict(values["files"]), values["temperature"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        for name, size in manifest.files.items():
            if not (folder / name).is_file():
                raise ValueError(f"{folder} is not whole: it lacks {name}")
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{folder / name} has {found} bytes, expected {size}")
        return manifest


def is_onnx(folder: str | Path) -> bool:
    """Say whether a folder holds an export."""
    return (Path(folder) / MANIFEST).is_file()


class OnnxBackend:
    """An exported folder as a `backend.Backend`.

    threads  that a product is spread over; by default onnxruntime's choice, the physical cores
    A file is loaded when it is first needed: who only captions holds no text encoder.

    onnxruntime scales what goes into an int8 product by one number for all of it. In int8, images
    and texts therefore run one by one, so that none depends on what else is in the batch, and
    captions of one image by themselves: beams of one image, and captions drawn for it together,
    do share their scales.

    Raises ValueError for a folder that is no whole export, and if onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        self._folder = Path(folder)
        self._ort = _onnxruntime()
        self._manifest = Manifest.read(self._folder)
        if threads is not None and threads < 1:
            raise ValueError(f"threads {threads} must be at least 1")
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self.device = torch.device("cpu")
        path = self._folder / "config.json"
        try:
            self.config = BlipConfig.from_json(json.loads(path.read_text("utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def precision(self) -> OnnxPrecision:
        """What the folder was exported in."""
        return self._manifest.precision

    @property
    def temperature(self) -> float:
        self._require("text")
        assert self._manifest.temperature is not None
        return self._manifest.temperature

    def encode_images(self, images: Tensor) -> Tensor:
        size = self.config.vision.image_size_px
        if tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images are {tuple(images.shape[1:])}, the model takes {(3, size, size)}"
            )
        return torch.cat([self._run("image_encoder", [part])[0] for part in self._alone(images)])

    def embed_images(self, images: Tensor) -> Tensor:
        return self.embed_states(self.encode_images(images))

    def embed_states(self, image_states: Tensor) -> Tensor:
        self._require("text")
        return self._run("image_embedding", [image_states[:, 0]])[0]

    def project_context(self, image_states: Tensor) -> Context:
        if not self.config.text.has_cross:
            raise ValueError("this model has neither the role 'pair' nor 'decode'")
        parts = [self._run("context", [part]) for part in self._alone(image_states)]
        tensors = _together(parts)
        layers = self.config.text.num_layers
        return Context(tuple(tensors[:layers]), tuple(tensors[layers:]))

    def embed_texts(self, token_ids: Tensor, text_mask: Tensor) -> Tensor:
        self._require("text")
        embedding = torch.empty(len(token_ids), self.config.embedding_width)
        order = text_mask.sum(dim=1).argsort(stable=True)
        for rows in torch.split(order, 1 if self.precision == "int8" else TEXTS_AT_ONCE):
            ids, mask = _trimmed(token_ids[rows], text_mask[rows])
            embedding[rows] = self._run("text_encoder", [ids, mask])[0]
        return embedding

    def match_logits(
        self, token_ids: Tensor, text_mask: Tensor, owners: Sequence[int], context: Context
    ) -> Tensor:
        self._require("pair")
        logits = torch.empty(len(token_ids), 2)
        if self.precision == "int8":
            runs = [(slice(i, i + 1), torch.tensor([place])) for place, i in enumerate(owners)]
        else:
            runs = list(_runs(owners))
        for images, rows in runs:
            seen = context[images]
            ids, mask = _trimmed(token_ids[rows], text_mask[rows])
            logits[rows] = self._run("pair_encoder", [ids, mask, *seen.keys, *seen.values])[0]
        return logits

    def new_decoder_cache(self) -> DecoderCache:
        return DecoderCache()

    def decode_step(self, token_ids: Tensor, cache: DecoderCache, context: Context) -> Tensor:
        self._require("decode")
        rows, images = len(token_ids), context.num_images
        if rows % images:
            raise ValueError(f"{rows} rows of text are not a multiple of {images} images")
        text = self.config.text
        if (length := cache.num_tokens + token_ids.shape[1]) > text.max_positions:
            raise ValueError(f"{length} tokens, the model has {text.max_positions} positions")
        if not cache.keys:
            empty = torch.zeros(rows, text.num_heads, 0, text.width // text.num_heads)
            cache.keys, cache.values = [empty] * text.num_layers, [empty] * text.num_layers
        past = [*cache.keys, *cache.values]
        if self.precision == "int8":
            own = rows // images
            parts = []
            for image in range(images):
                part = slice(image * own, (image + 1) * own)
                seen = context[image : image + 1]
                state = [tensor[part] for tensor in past]
                parts.append(
                    self._run("decoder", [token_ids[part], *state, *seen.keys, *seen.values])
                )
            found = _together(parts)
        else:
            found = self._run("decoder", [token_ids, *past, *context.keys, *context.values])
        logits, *present = found
        cache.keys, cache.values = present[: text.num_layers], present[text.num_layers :]
        return logits

    def _alone(self, rows: Tensor) -> Sequence[Tensor]:
        """Return images as they run: together, or in int8 one by one."""
        return torch.split(rows, 1) if self.precision == "int8" else [rows]

    def _run(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run a file on inputs in its order; what is contiguous is copied neither way."""
        session = self._session(name)
        named = {
            node.name: tensor.detach().contiguous().numpy()
            for node, tensor in zip(session.get_inputs(), inputs, strict=True)
        }
        return [torch.from_numpy(output) for output in session.run(None, named)]

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            path = self._folder / f"{name}.onnx"
            options = self._ort.SessionOptions()
            if self._threads is not None:
                options.intra_op_num_threads = self._threads
            try:
                self._sessions[name] = self._ort.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime's own classes share no base of their own
                raise ValueError(f"{path} cannot be loaded: {error}") from error
        return self._sessions[name]

    def _require(self, role: Role) -> None:
        if role not in self.config.text.roles:
            raise ValueError(
                f"this model has no role {role!r}; "
                f"it has: {', '.join(sorted(self.config.text.roles))}"
            )


def _onnxruntime() -> Any:
    try:
        import onnxruntime  # An extra: only who runs exports needs it.
    except ImportError as error:
        raise ValueError(
            "ONNX models are run by the library onnxruntime: pip install 'openblip[onnx]'"
        ) from error
    return onnxruntime


def _together(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Put the outputs of several runs behind each other."""
    if len(parts) == 1:
        return list(parts[0])
    return [torch.cat(several) for several in zip(*parts, strict=True)]


def _trimmed(token_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return texts (R, L) without the columns that are padding in all of them."""
    length = int(text_mask.sum(dim=1).max())
    return token_ids[:, :length], text_mask[:, :length]


def _runs(owners: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Yield images that stand side by side and have equally many texts, and the texts' places.

    The places are ordered by image: such a run is one batch, and its images' keys and values are a
    slice, never a copy.
    """
    places: dict[int, list[int]] = {}
    for place, image in enumerate(owners):
        places.setdefault(image, []).append(place)
    first, rows = -1, list[int]()
    count = 0
    for image in sorted(places):
        own = places[image]
        if rows and image == first + len(rows) // count and len(own) == count:
            rows += own
            continue
        if rows:
            yield slice(first, first + len(rows) // count), torch.tensor(rows)
        first, rows, count = image, list(own), len(own)
    if rows:
        yield slice(first, first + len(rows) // count), torch.tensor(rows)
