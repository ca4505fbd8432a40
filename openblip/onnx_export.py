"""Write a BLIP as ONNX files, which `onnx_backend` and other programs run without PyTorch's code.

What each file takes and gives stands in `onnx_parts`.
"""

import contextlib
import copy
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from openblip.backend import Backend, TorchBackend
from openblip.checkpoint import check_is_free
from openblip.data.sinks import write_json_atomically
from openblip.models.blip import Blip
from openblip.models.context import Context
from openblip.onnx_backend import MANIFEST, Manifest, OnnxBackend, OnnxPrecision
from openblip.onnx_parts import Part, parts_of
from openblip.tokenizer import Tokenizer

OPSET = 18
FLOAT32_TOLERANCE = 1e-3
"""How far a float32 export may be from PyTorch; see `Differences`."""


@dataclass(frozen=True)
class Differences:
    """The largest differences from PyTorch in float32, on random images and texts.

    image_states, decoder_logits  divided by the largest value where that is above 1
    others                        as they are; None for what the model does not have
    """

    image_states: float
    image_embedding: float | None
    text_embedding: float | None
    match_probability: float | None
    decoder_logits: float | None

    @property
    def largest(self) -> float:
        """The largest; infinite if any is no number."""
        known = [value for value in asdict(self).values() if value is not None]
        return max(value if value == value else float("inf") for value in known)


@dataclass(frozen=True)
class OnnxReport:
    """What was written: bytes of each file, and how far it is from PyTorch."""

    precision: OnnxPrecision
    files: dict[str, int]
    differences: Differences

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def export_onnx(
    blip: Blip,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    precision: OnnxPrecision = "float32",
) -> OnnxReport:
    """Write a folder of ONNX files, of the roles that the model has, and compare it with the model.

    precision  int8: weights of the linear layers by output channel, what goes into them by one
               scale for all rows together (onnxruntime's dynamic quantisation), so that a row's
               result depends on the other rows of the call: `OnnxBackend` runs images and texts one
               by one. Embeddings, projections to E, the ITM head and patches stay in float32. On
               processors without VNNI int8 products may saturate, which costs accuracy.
    The folder appears whole or not at all, and only if float32 is within FLOAT32_TOLERANCE.
    Raises ValueError if something is there already, if the extra `onnx` is not installed, and for
    an export that is further from the model.
    """
    folder = Path(folder)
    check_is_free(folder)
    _require_libraries()
    # Exported from a copy: the caller's model keeps its mode, and its place.
    model = copy.deepcopy(blip).cpu().float().eval()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, part in parts_of(model).items():
            _write(part, temporary / f"{name}.onnx")
            if precision == "int8" and name != "image_embedding":
                _quantise(temporary / f"{name}.onnx", part)
        write_json_atomically(
            temporary / "config.json", replace(model.config, reconstruction=None).to_json()
        )
        tokenizer.save(temporary / "tokenizer.json")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        has_text = "text" in model.config.text.roles
        temperature = model.temperature.item() if has_text else None
        manifest = Manifest(precision, files, temperature)
        write_json_atomically(temporary / MANIFEST, manifest.to_json())
        reference = TorchBackend(model, "float32", prepack=False)
        differences = compare(reference, OnnxBackend(temporary))
        if precision == "float32" and differences.largest > FLOAT32_TOLERANCE:
            raise ValueError(
                f"the export is up to {differences.largest:.2g} from the model, more than "
                f"{FLOAT32_TOLERANCE}, and was removed: {differences}"
            )
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return OnnxReport(precision, files, differences)


def compare(reference: Backend, other: Backend, *, seed: int = 0) -> Differences:
    """Measure how far another backend of the same model is, on random images and texts.

    Two images, with three texts each, and two steps of decoding with two rows per image.
    """
    draw = torch.Generator().manual_seed(seed)
    config = reference.config
    size, tokens, roles = config.vision.image_size_px, config.tokens, config.text.roles
    images = torch.randn(2, 3, size, size, generator=draw)
    lengths = [min(length, config.text.max_positions) for length in (4, 9, 17)]
    ids = torch.randint(config.text.vocab_size, (6, max(lengths)), generator=draw)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths * 2)[:, None]).long()
    ids = ids.where(mask.bool(), torch.tensor(tokens.pad))
    states = [backend.encode_images(images) for backend in (reference, other)]
    found: dict[str, float | None] = {"image_states": _relative(*states)}
    both = list(zip((reference, other), states, strict=True))
    image = [backend.embed_states(own) for backend, own in both] if "text" in roles else None
    found["image_embedding"] = None if image is None else _absolute(*image)
    text = [b.embed_texts(ids, mask) for b, _ in both] if "text" in roles else None
    found["text_embedding"] = None if text is None else _absolute(*text)
    contexts = [b.project_context(own) for b, own in both] if config.text.has_cross else []
    seen = list(zip((reference, other), contexts, strict=bool(contexts)))
    found["match_probability"] = found["decoder_logits"] = None
    if "pair" in roles:
        owners = [0, 0, 0, 1, 1, 1]
        judged = [b.match_logits(ids, mask, owners, c).softmax(dim=1) for b, c in seen]
        found["match_probability"] = _absolute(*judged)
    if "decode" in roles:
        prompt = ids[:2, :3].clone()
        prompt[:, 0] = tokens.dec
        logits = [torch.cat(_two_steps(b, c, prompt, ids[:4, 3:4])) for b, c in seen]
        found["decoder_logits"] = _relative(*logits)
    return Differences(**cast(dict[str, Any], found))


def _two_steps(
    backend: Backend, context: Context, prompt: Tensor, following: Tensor
) -> list[Tensor]:
    """Decode a prompt (B, T) and one more token of twice as many rows -> logits of both."""
    cache = backend.new_decoder_cache()
    first = backend.decode_step(prompt, cache, context)
    cache.reorder(torch.arange(len(prompt)).repeat_interleave(2))
    return [first, backend.decode_step(following, cache, context)]


def _absolute(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def _relative(ours: Tensor, theirs: Tensor) -> float:
    return _absolute(ours, theirs) / max(1.0, float(ours.abs().max()))


def _write(part: Part, path: Path) -> None:
    """Write one file, its weights beside it in `<name>.onnx.data`."""
    free = torch.export.Dim.DYNAMIC
    shapes: list[Any] = []
    for example, axes in zip(part.examples, part.sizes, strict=True):
        own = dict.fromkeys(axes, free)
        shapes.append(own if isinstance(example, Tensor) else tuple(own for _ in example))
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            part.module.eval(),
            part.examples,
            path,
            input_names=part.inputs,
            output_names=part.outputs,
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=tuple(shapes),
            external_data=True,
            verbose=False,
        )
    _forget_origin(path)


def _forget_origin(path: Path) -> None:
    """Remove from a file what the exporter tells of the sources and the paths on this machine."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    path.write_bytes(model.SerializeToString())


def _quantise(path: Path, part: Part) -> None:
    """Replace a file by one whose products by weights are in int8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path, load_external_data=False).graph
    constant = {tensor.name for tensor in graph.initializer}
    products = [
        node.name
        for node in graph.node
        if node.op_type in {"MatMul", "Gemm"} and set(node.input[1:2]) & constant
    ]
    temporary = path.with_suffix(".float.onnx")
    data = path.with_name(f"{path.name}.data")
    with _quiet():
        quantize_dynamic(
            path,
            temporary,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[products[place] for place in part.float_products],
            extra_options={"MatMulConstBOnly": True},
        )
    data.unlink()
    temporary.replace(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporter and the quantiser say of their own workings."""
    names: Sequence[str] = ("torch.onnx", "onnxscript", "root")
    loggers = [logging.getLogger(None if name == "root" else name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _require_libraries() -> None:
    try:
        import onnx  # noqa: F401  Extras: only who exports needs them.
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the library {error.name} is not installed: pip install 'openblip[onnx]'"
        ) from error
