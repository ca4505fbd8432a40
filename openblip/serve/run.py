"""A server as a process: it starts, serves, and stops when everything that it took is answered."""

import asyncio
import json
import logging
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from openblip.serve.app import guarded
from openblip.serve.guard import Guard
from openblip.serve.settings import ServerSettings

_BACKLOG, _MOST_HEADER_BYTES, _CLOSING_S = 2048, 16_384, 5
_log = logging.getLogger("openblip.serve")


class JsonLines(logging.Formatter):
    """One JSON object a line; what is one already gets time and level."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        values = json.loads(message) if message.startswith("{") else {"event": message}
        head = {"time": round(record.created, 3), "level": record.levelname.lower()}
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps({**head, **values}, ensure_ascii=False)


class DrainingServer(uvicorn.Server):
    """Stops at the first signal once all accepted requests are answered, at the second at once."""

    def __init__(self, guard: Guard, drain_timeout_s: float) -> None:
        config = uvicorn.Config(
            guard,
            log_config=None,
            access_log=False,
            server_header=False,
            # Anyone can write X-Forwarded-For: whoever connects is the client.
            proxy_headers=False,
            # The limit below is of this one.
            http="h11",
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
            timeout_graceful_shutdown=_CLOSING_S,
        )
        super().__init__(config)
        self._guard, self._drain_timeout_s = guard, drain_timeout_s
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._guard.is_draining:
            self.should_exit = self.force_exit = True
            return
        self._guard.is_draining = True
        self._deadline = time.monotonic() + self._drain_timeout_s

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None and not self.should_exit:
            is_late = time.monotonic() > self._deadline
            if is_late:
                _log.warning("%d requests were not answered in time", self._guard.num_active)
                self.force_exit = True
            self.should_exit = is_late or self._guard.num_active == 0
        return await super().on_tick(counter)


def serve(app: FastAPI, settings: ServerSettings, host: str, port: int) -> None:
    """Serve until a signal comes. Raises ValueError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror}") from error
    guard = guarded(app)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving at http://{shown}:{listener.getsockname()[1]}/", flush=True)
    asyncio.run(DrainingServer(guard, settings.drain_timeout_s).serve([listener]))


def log_as_json() -> None:
    """Let all logging go to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("openblip").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
