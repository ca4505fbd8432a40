"""The models of a server, by name, and what each can do."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from openblip.backend import TorchBackend
from openblip.hub import load_engine_with_id
from openblip.inference import Dtype, Engine
from openblip.models.blip import BlipConfig
from openblip.serve.errors import RequestError
from openblip.serve.metrics import Metrics
from openblip.serve.worker import Worker

Verb = Literal["caption", "match", "ask", "classify", "embed", "explain", "search"]
_HOW = {
    "ask": "a model that answers questions comes from `openblip finetune vqa`",
    "search": "start the server with --index, and with the model that the index was made with",
}


@dataclass(frozen=True)
class ServedModel:
    """A model with the thread that works on it."""

    name: str
    engine: Engine
    model_id: str
    verbs: tuple[Verb, ...]
    worker: Worker


class Models:
    """All models of a server; the first that can do something does it unless one is named."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def pick(self, verb: Verb, name: str | None) -> ServedModel:
        """Return the model for a verb. Raises RequestError if there is none, or it cannot do it."""
        if name is not None and name not in self._models:
            raise RequestError(
                404, "unknown_model", f"there is no such model; there are {', '.join(self._models)}"
            )
        asked = list(self) if name is None else [self._models[name]]
        for model in asked:
            if verb in model.verbs:
                return model
        which = "no model of this server" if name is None else f"the model {name}"
        hint = f": {_HOW[verb]}" if verb in _HOW else ""
        raise RequestError(404, "no_such_verb", f"{which} can {verb}{hint}")

    def stop(self) -> None:
        """Do what waits, and end all workers."""
        for model in self:
            model.worker.stop()


def load_models(
    named: Mapping[str, str],
    *,
    dtype: Dtype,
    batch_size: int | None,
    batch_wait_s: float,
    metrics: Metrics,
    searched_id: str | None,
) -> Models:
    """Load models (name -> folder or name on the Hub).

    searched_id  hash of the model that the server's index was made with
    Raises ValueError as loading does, and if no model is the index's.
    """
    models = []
    for name, address in named.items():
        engine, model_id = load_engine_with_id(address, dtype=dtype, batch_size=batch_size)
        models.append(
            serve_model(name, engine, model_id, batch_wait_s, metrics, searched_id=searched_id)
        )
    if searched_id is not None and not any("search" in model.verbs for model in models):
        for model in models:
            model.worker.stop()
        raise ValueError(
            f"the index was made with a model {searched_id}, which is none of "
            f"{', '.join(f'{model.name} ({model.model_id})' for model in models)}"
        )
    return Models(models)


def serve_model(
    name: str,
    engine: Engine,
    model_id: str,
    batch_wait_s: float,
    metrics: Metrics,
    *,
    searched_id: str | None = None,
) -> ServedModel:
    """Start the thread of a loaded model."""
    worker = Worker(
        engine,
        batch_size=engine.batcher.batch_size,
        wait_s=batch_wait_s,
        on_batch=lambda kind, size, seconds: metrics.note_batch(name, kind, size, seconds),
        name=name,
    )
    metrics.watch_queue(name, worker.__len__)
    verbs = verbs_of(engine)
    if searched_id is not None and model_id == searched_id and "embed" in verbs:
        verbs = (*verbs, "search")
    return ServedModel(name, engine, model_id, verbs, worker)


def verbs_of(engine: Engine) -> tuple[Verb, ...]:
    """Return what can be asked of an engine; searching needs an index beside it."""
    config = engine.config
    if not isinstance(config, BlipConfig):
        return ("ask",)
    needed: dict[Verb, bool] = {
        "caption": "decode" in config.text.roles,
        "match": {"text", "pair"} <= config.text.roles,
        "classify": "text" in config.text.roles,
        "embed": "text" in config.text.roles,
        "explain": "pair" in config.text.roles
        and isinstance(engine.backend, TorchBackend)
        and config.text.num_layers > 1,
    }
    return tuple(verb for verb in get_args(Verb) if needed.get(verb, False))


def named_models(values: Sequence[str]) -> dict[str, str]:
    """Read `name=address`, or an address alone, which is named by its last part.

    Raises ValueError for two of one name.
    """
    named: dict[str, str] = {}
    for value in values:
        name, equals, address = value.partition("=")
        if not equals:
            name, address = Path(value).name or value, value
        if name in named:
            raise ValueError(
                f"two models are named {name}: give them names, as first={named[name]} "
                f"second={address}"
            )
        named[name] = address
    return named
