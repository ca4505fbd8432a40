"""Servers of tiny models, in threads of this process."""

import asyncio
import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image

from openblip.data.world import draw_scene, random_scene
from openblip.hub import load
from openblip.inference import Engine
from openblip.models.blip import Blip
from openblip.models.vqa import Vqa, VqaConfig
from openblip.search.add import add_source
from openblip.search.index import Index
from openblip.search.writer import IndexWriter
from openblip.serve.app import build_app, guarded
from openblip.serve.metrics import Metrics
from openblip.serve.models import Models, serve_model
from openblip.serve.run import DrainingServer
from openblip.serve.settings import ServerSettings
from openblip.serve.works import SharedIndex
from openblip.tokenizer import Tokenizer
from tests.cli.conftest import MODEL, model, world  # noqa: F401

IDENTITY = "0123456789abcdef"


class RunningServer:
    """A server in a thread, and a client of it."""

    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        self.app = app
        self.guard = guarded(app)
        listener = socket.create_server(("127.0.0.1", 0))
        self.server = DrainingServer(self.guard, settings.drain_timeout_s)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve([listener])), daemon=True
        )
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def post(self, verb: str, image: bytes | None = None, **fields: Any) -> httpx.Response:
        files = {} if image is None else {"image": ("picture", image)}
        return self.client.post(f"/v1/{verb}", files=files or None, data=fields)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self._thread.join(20)


@pytest.fixture(scope="session")
def engine(model: Path) -> Engine:  # noqa: F811
    return Engine.plain(*load(model))


@pytest.fixture(scope="session")
def deep_engine(model: Path) -> Engine:  # noqa: F811
    """Return an engine of two layers, whose matches can be explained."""
    tokenizer = Tokenizer.load(model / "tokenizer.json")
    torch.manual_seed(1)
    config = MODEL.model_copy(update={"text_layers": 2}).build_config(tokenizer)
    return Engine.plain(Blip(config).eval(), tokenizer)


@pytest.fixture(scope="session")
def vqa_engine(model: Path) -> Engine:  # noqa: F811
    tokenizer = Tokenizer.load(model / "tokenizer.json")
    config = MODEL.build_config(tokenizer)
    torch.manual_seed(2)
    vqa = Vqa(VqaConfig.from_text(config.vision, config.text, tokenizer.special))
    return Engine.plain(vqa.eval(), tokenizer)


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """Return eight drawn pictures."""
    rng = np.random.default_rng(0)
    return [draw_scene(random_scene(rng), 48, rng) for _ in range(8)]


@pytest.fixture(scope="session")
def picture(pictures: list[bytes]) -> bytes:
    return pictures[0]


@pytest.fixture(scope="session")
def index(engine: Engine, pictures: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("searched")
    for number, data in enumerate(pictures):
        (folder / f"picture_{number}.jpg").write_bytes(data)
        (folder / f"picture_{number}.txt").write_text(f"caption {number}")
    path = folder / "index"
    width = engine.backend.config.embedding_width
    with IndexWriter(path, model="m", model_id=IDENTITY, embedding_width=width) as writer:
        add_source(writer, engine, str(folder), on_bad=lambda key, reason: None)
    return Index.open(path)


Serve = Callable[..., RunningServer]


@pytest.fixture
def serve(engine: Engine, deep_engine: Engine, vqa_engine: Engine, index: Index) -> Iterator[Serve]:
    """Start servers with settings of their own."""
    with contextlib.ExitStack() as stack:

        def serve(**settings: Any) -> RunningServer:
            return stack.enter_context(
                contextlib.closing(
                    _start(engine, deep_engine, vqa_engine, index, ServerSettings(**settings))
                )
            )

        yield serve


@pytest.fixture(scope="module")
def running(
    engine: Engine, deep_engine: Engine, vqa_engine: Engine, index: Index, tmp_path_factory: Any
) -> Iterator[RunningServer]:
    """Return a server with all there is, which a file's tests share."""
    run = tmp_path_factory.mktemp("runs") / "first run"
    (run / "logs").mkdir(parents=True)
    (run / "report.html").write_text("<h1>report</h1>")
    (run / "logs" / "curves.html").write_text("<h1>curves</h1>")
    (run / "secret.txt").write_text("secret")
    (run.parent / "outside.html").write_text("outside")
    (run / "link.html").symlink_to(run.parent / "outside.html")
    settings = ServerSettings(
        max_upload_bytes=300_000, max_pixels=1_000_000, max_texts=16, max_characters=500,
        runs={"first run": run},
    )  # fmt: skip
    server = _start(engine, deep_engine, vqa_engine, index, settings)
    with contextlib.closing(server):
        yield server


def _start(
    engine: Engine, deep: Engine, vqa: Engine, index: Index, settings: ServerSettings
) -> RunningServer:
    metrics = Metrics()
    models = Models(
        [
            serve_model("tiny", engine, IDENTITY, 0.004, metrics, searched_id=IDENTITY),
            serve_model("deep", deep, "deep", 0.004, metrics),
            serve_model("vqa", vqa, "vqa", 0.004, metrics),
        ]
    )
    return RunningServer(build_app(models, settings, metrics, SharedIndex(index)), settings)


def alone(engine: Engine) -> RunningServer:
    """Start a server of one model, without index and runs."""
    settings, metrics = ServerSettings(), Metrics()
    models = Models([serve_model("tiny", engine, IDENTITY, 0.004, metrics)])
    return RunningServer(build_app(models, settings, metrics), settings)


def encoded(width: int, height: int, kind: str = "PNG") -> bytes:
    """Return a picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, kind)
    return buffer.getvalue()
