"""What every test may ask for: reference numbers, shared data, a web server that fails.

Every test worker has one thread.
"""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# Two workers on two cores, each with a thread pool of its own, would fight for the cores.
# The variable also reaches the processes that command-line tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# A busy machine is no failure of the code: examples have no time limit.
settings.register_profile("openblip", deadline=None)
settings.load_profile("openblip")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def reference() -> Path:
    """Return the folder with the numbers of the original code (OPENBLIP_REFERENCE)."""
    folder = Path(os.environ.get("OPENBLIP_REFERENCE", REPOSITORY / "tests" / "reference"))
    if not (folder / "config.json").is_file():
        pytest.fail(f"OPENBLIP_REFERENCE names {folder}, which holds no config.json")
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared data (OPENBLIP_SHARED); skip the test where there is none."""
    value = os.environ.get("OPENBLIP_SHARED")
    if not value:
        pytest.skip("OPENBLIP_SHARED is not set: it names the folder with the shared data sets")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"OPENBLIP_SHARED names {folder}, which is not a folder")
    return folder


class FailingServer:
    """A web server on this machine: serves a folder, and fails in the ways that it is told.

    failures  left, by path: a status, `cut` (half of a body), `hang up` (no answer at all)
    num_left  requests that are answered before it vanishes; None: it stays
    requests  that came, by path
    ranges    that were asked for
    """

    def __init__(self, folder: Path, *, has_ranges: bool = True) -> None:
        self.folder, self.has_ranges = folder, has_ranges
        self.failures: dict[str, list[int | str]] = {}
        self.num_left: int | None = None
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        self.requests[name] += 1
        if asked := request.headers.get("Range"):
            self.ranges.append(asked)
        waiting = self.failures.get(name)
        failure = waiting.pop(0) if waiting else None
        if self.num_left is not None:
            self.num_left -= 1
            failure = "hang up" if self.num_left < 0 else failure
        if failure == "hang up":
            request.close_connection = True
            return
        if isinstance(failure, int):
            request.send_error(failure)
            return
        path = self.folder / name
        if not path.is_file():
            request.send_error(404)
            return
        body = path.read_bytes()
        start = 0
        is_same = request.headers.get("If-Range") == self.tag(body)
        if asked and is_same and self.has_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        request.send_header("ETag", self.tag(body))
        body = body[start:]
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if failure == "cut" else body)
        request.close_connection = True

    @staticmethod
    def tag(body: bytes) -> str:
        return f'"{hash(body)}"'

    def close(self) -> None:
        """Vanish."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, and wait for milliseconds where one waits for seconds."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OPENBLIP_CACHE", str(folder))
    monkeypatch.setattr("openblip.data.remote.FIRST_DELAY_S", 0.001)
    return folder


@pytest.fixture
def server(tmp_path: Path, cache: Path) -> Iterator[FailingServer]:
    """Serve the folder `tmp_path / "served"`, past any proxy, with an empty cache."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = FailingServer(folder)
    with contextlib.closing(server):
        yield server
