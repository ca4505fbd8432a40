"""Models by name: a local folder, or a model of the Hugging Face Hub in its local cache."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from openblip.checkpoint import (
    CALIBRATION,
    FILES,
    load_checkpoint,
    load_nlvr_checkpoint,
    load_tokenizer,
    load_vqa_checkpoint,
    model_id,
)
from openblip.convert import Converted, read_transformers, read_transformers_vqa
from openblip.convert_transformers import answers_questions
from openblip.data.shards import checksum
from openblip.hub_card import model_card, read_made
from openblip.inference import Dtype, Engine
from openblip.models.blip import Blip
from openblip.models.nlvr import Nlvr
from openblip.models.vqa import Vqa
from openblip.onnx_backend import OnnxBackend, is_onnx
from openblip.tokenizer import Tokenizer

# Of all that a repository may hold (other frameworks' weights, training states), what we read.
PATTERNS = [*FILES, CALIBRATION, "tokenizer_config.json", "vocab.txt", "model-*.safetensors"]
PATTERNS += ["model.safetensors.index.json"]
CARD = "README.md"
# What transformers reads of a folder, its weights without pickles.
THEIR_PATTERNS = [CARD, "*config.json", "*.safetensors", "model.safetensors.index.json"]
THEIR_PATTERNS += ["tokenizer.json", "vocab.txt", "special_tokens_map.json"]
PICKLED_PATTERNS = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]

_log = logging.getLogger(__name__)

M = TypeVar("M", Blip, Vqa)


def resolve(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Return the local folder of a model; a name is downloaded unless it is in the cache.

    name_or_path  a folder, which goes first, or the Hub's `owner/model`
    revision      branch, tag or commit of the Hub
    Raises ValueError for an unknown name or revision, and if the Hub cannot be reached for what
    the cache lacks; HF_HUB_OFFLINE=1 forbids to try.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder, which has no revision {revision!r}")
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file, expected a folder: convert a released checkpoint")
    name = str(name_or_path)
    folder = _download(name, revision, PATTERNS)
    if not any(folder.glob("model*.safetensors")):
        folder = _download(name, revision, [*PATTERNS, *PICKLED_PATTERNS])
    return folder


def load(name_or_path: str | Path, *, revision: str | None = None) -> tuple[Blip, Tokenizer]:
    """Load a model, in eval mode, and its tokenizer; the arguments are those of `resolve`.

    A transformers folder is converted in memory; what its user must know is logged.
    Raises ValueError as `resolve` does, and for weights that do not fit, listing them.
    """
    return _load(name_or_path, revision, load_checkpoint, read_transformers)


def is_vqa(name_or_path: str | Path) -> bool:
    """Say whether a model, ours or transformers', answers questions. Raises as `resolve` does."""
    values = _config_of(resolve(name_or_path))
    return values.get("task") == "vqa" or answers_questions(values)


def load_vqa(name_or_path: str | Path, *, revision: str | None = None) -> tuple[Vqa, Tokenizer]:
    """Load a model that answers questions, as `load` does one that captions and matches."""
    return _load(name_or_path, revision, load_vqa_checkpoint, read_transformers_vqa)


def load_nlvr(name_or_path: str | Path, *, revision: str | None = None) -> tuple[Nlvr, Tokenizer]:
    """Load a model for NLVR2, as `load` does one that captions and matches; there is none of
    transformers.
    """
    return load_nlvr_checkpoint(resolve(name_or_path, revision=revision))


def load_engine(
    name_or_path: str | Path, *, dtype: Dtype = "auto", batch_size: int | None = None
) -> Engine:
    """Load whatever captions, matches or answers questions, ready to be asked.

    name_or_path       as of `resolve`: a model as of `load` or of `load_vqa`, or a local folder of
                       `openblip export onnx`
    dtype, batch_size  as of `Engine`; an export has the precision that it was written in
    Raises ValueError as `load`, `Engine` and `OnnxBackend` do, and for an export of another dtype.
    """
    return load_engine_with_id(name_or_path, dtype=dtype, batch_size=batch_size, has_id=False)[0]


def load_engine_with_id(
    name_or_path: str | Path,
    *,
    dtype: Dtype = "auto",
    batch_size: int | None = None,
    has_id: bool = True,
) -> tuple[Engine, str]:
    """Load an engine, as `load_engine` does, and the hash that names its weights.

    has_id  compute the hash, which reads all weights once more; else it is empty
    """
    folder = resolve(name_or_path)
    if is_onnx(folder):
        backend = OnnxBackend(folder)
        if dtype not in ("auto", backend.precision):
            raise ValueError(
                f"{folder} was exported in {backend.precision}, and cannot be run in {dtype}"
            )
        tokenizer = load_tokenizer(folder)
        name = checksum(folder)[:16] if has_id else ""
        return Engine(backend, tokenizer, batch_size=batch_size), name
    model, tokenizer = load_vqa(folder) if is_vqa(folder) else load(folder)
    name = model_id(model) if has_id else ""
    return Engine(model, tokenizer, dtype=dtype, batch_size=batch_size), name


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = True,
    card: str | None = None,
    message: str = "Add a model of openblip",
) -> str:
    """Upload a folder of ours or of transformers, making the repository if needed; return its URL.

    name  the Hub's `owner/model`; the login is the one of `hf auth login` or HF_TOKEN
    card  the model card in Markdown, as of `filled_card`; None uploads the folder's README.md
    Nothing of the folder but what `files_to_push` names is uploaded, all in one commit.
    Raises ValueError if the folder is not whole, and if the Hub refuses.
    """
    content: dict[str, Path | bytes] = {
        file: Path(folder) / file for file in files_to_push(folder, has_card=card is not None)
    }
    if card is not None:
        content[CARD] = card.encode()
    operations = [CommitOperationAdd(path, data) for path, data in content.items()]
    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(name, operations, commit_message=message)
    except (HfHubHTTPError, HFValidationError, ConnectionError) as error:
        raise ValueError(f"{name} was not uploaded: {_first_line(error)}") from error
    return str(url)


def files_to_push(folder: str | Path, *, has_card: bool = False) -> list[str]:
    """Return the names of the files of a model that go to the Hub; pickles never do.

    has_card  the model card comes from elsewhere
    Raises ValueError if the folder is not whole.
    """
    folder = Path(folder)
    is_theirs = _is_of_transformers(folder)
    patterns = THEIR_PATTERNS if is_theirs else [*FILES, CALIBRATION]
    found = {path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if has_card:
        found.add(CARD)
    needed = {"preprocessor_config.json", "tokenizer_config.json", CARD} if is_theirs else {*FILES}
    absent = needed - found
    if is_theirs and not any(name.endswith(".safetensors") for name in found):
        absent.add("model.safetensors")
    if absent:
        kind = "folder of transformers" if is_theirs else "checkpoint"
        raise ValueError(f"{folder} is no whole {kind}: it lacks {', '.join(sorted(absent))}")
    return sorted(found - {CARD} if has_card else found)


def filled_card(folder: str | Path, name: str, *, license_name: str | None = None) -> str:
    """Return the model card of a folder, filled with all that is known of it (`hub_card`).

    name          the Hub's `owner/model`
    license_name  one of the Hub's names, such as apache-2.0; None leaves it to be filled in there
    Raises ValueError for a folder that cannot be loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: what is pushed is a local one")
    is_theirs = _is_of_transformers(folder)
    model: Blip | Nlvr | Vqa
    match _task_of(folder):
        case "nlvr":
            model, _ = load_nlvr(folder)
        case _ if is_vqa(folder):
            model, _ = load_vqa(folder)
        case _:
            model, _ = load(folder)
    return model_card(
        model, name, read_made(folder), license_name=license_name, is_of_transformers=is_theirs
    )


def _load(
    name_or_path: str | Path,
    revision: str | None,
    read_ours: Callable[[Path], tuple[M, Tokenizer]],
    read_theirs: Callable[[Path], Converted[M]],
) -> tuple[M, Tokenizer]:
    folder = resolve(name_or_path, revision=revision)
    if not _is_of_transformers(folder):
        return read_ours(folder)
    converted = read_theirs(folder)
    for note in converted.report.notes:
        _log.info("%s: %s", name_or_path, note)
    return converted.model, converted.tokenizer


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(
            f"{name!r} is neither a folder nor a name of the Hub, such as 'owner/model'"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is neither a folder nor a model of the Hub that you may read"
        ) from error
    except LocalEntryNotFoundError as error:
        what = name if revision is None else f"{name} at revision {revision!r}"
        raise ValueError(
            f"{what} is not in the cache, and the Hub is offline or cannot be reached"
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"the Hub gave no {name}: {_first_line(error)}") from error


def _is_of_transformers(folder: Path) -> bool:
    return "model_type" in _config_of(folder)


def _task_of(folder: Path) -> object:
    return _config_of(folder).get("task")


def _config_of(folder: Path) -> dict[str, Any]:
    """Return what config.json holds, or nothing if it is none."""
    try:
        values = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
