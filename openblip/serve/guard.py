"""What every request passes before a route sees it, and what is noted of it after.

One ASGI layer around the app: request id, bearer token, rate of each client, number of requests at
once, size and time of the body, security headers, one log line and the metrics. What is refused is
refused before its body is looked at.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import MutableMapping, Sequence
from typing import Any

from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openblip.serve.errors import RequestError, error_body
from openblip.serve.metrics import Metrics
from openblip.serve.settings import ServerSettings

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_CLIENTS = 10_000
_DISCARDED = 4
"""Times the largest upload that is read of one that is refused."""
_GUARDED, _PICTURES = "/v1/", "/v1/pictures/"
_log = logging.getLogger("openblip.serve.requests")


class Buckets:
    """Token buckets: a client may send `burst` requests at once, and `per_s` in the long run."""

    def __init__(self, per_s: float, burst: int) -> None:
        self._per_s, self._burst = per_s, burst
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str, now: float) -> float:
        """Take one; return 0, or the seconds until the client may ask again."""
        level, before = self._levels.pop(client, (float(self._burst), now))
        level = min(float(self._burst), level + (now - before) * self._per_s)
        missing = max(0.0, 1.0 - level)
        self._levels[client] = (level if missing else level - 1.0, now)
        if len(self._levels) > _MOST_CLIENTS:
            self._levels.popitem(last=False)
        return missing / self._per_s


class Guard:
    """The layer; `num_active` requests for models are accepted and not yet answered."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._tokens = [token.encode() for token in settings.tokens]
        rate = settings.requests_per_s
        self._buckets = None if rate is None else Buckets(rate, settings.burst)
        self.num_active = 0
        self.is_draining = False
        self._seconds_each = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        path = scope["path"]
        is_picture = path.startswith(_PICTURES)
        is_work = is_picture or (scope["method"] == "POST" and path.startswith(_GUARDED))
        start = time.monotonic()
        try:
            self._refuse(scope, path, exchange, is_work=is_work)
        except RequestError as error:
            body = error_body(error.code, str(error.detail), exchange.request_id)
            response = JSONResponse(body, error.status_code, headers=error.headers)
            await self._discard(receive, exchange.num_bytes)
            answer: ASGIApp = response
            if self._settings.origins:
                # Those sites' pages must be able to read why, and when to come back.
                answer = CORSMiddleware(response, **cors_options(self._settings.origins))
            await answer(scope, receive, exchange.send)
            self._note(exchange, time.monotonic() - start)
            return
        self.num_active += is_work
        try:
            await self._app(scope, self._limited(scope, receive), exchange.send)
        except Exception:
            _log.exception("request %s failed", exchange.request_id)
        finally:
            seconds = time.monotonic() - start
            if is_work:
                self._seconds_each += 0.1 * (seconds / self.num_active - self._seconds_each)
                self.num_active -= 1
            self._note(exchange, seconds)

    def _refuse(self, scope: Scope, path: str, exchange: "_Exchange", *, is_work: bool) -> None:
        settings = self._settings
        is_preflight = scope["method"] == "OPTIONS"
        client = scope["client"][0] if scope.get("client") else "unknown"
        if self._tokens and not is_preflight and (path.startswith(_GUARDED) or path == "/metrics"):
            given = exchange.header(b"authorization")
            token = given[7:] if given[:7].lower() == b"bearer " else b""
            # All are compared, whichever fits: the time tells nothing.
            fits = [hmac.compare_digest(token, one) for one in self._tokens]
            if not any(fits):
                headers = {"WWW-Authenticate": "Bearer"}
                raise RequestError(401, "unauthorized", "a bearer token is needed", headers)
            client = f"token {fits.index(True)}"
        if not is_work:
            return
        if self.is_draining:
            headers = {"Connection": "close", "Retry-After": "5"}
            raise RequestError(503, "stopping", "the server is stopping", headers)
        if exchange.num_bytes > settings.max_upload_bytes:
            raise _too_large(settings.max_upload_bytes)
        # A page of found pictures is one request to who looks at it.
        buckets = None if path.startswith(_PICTURES) else self._buckets
        if buckets is not None and (wait := buckets.wait_s(client, time.monotonic())):
            headers = {"Retry-After": str(_whole_seconds(wait))}
            raise RequestError(429, "rate_limited", "too many requests of this client", headers)
        if self.num_active >= settings.max_active:
            # As long as the half of those that are here should take.
            wait = 0.5 * self.num_active * self._seconds_each
            headers = {"Retry-After": str(_whole_seconds(wait))}
            raise RequestError(429, "busy", "the server is busy; ask again", headers)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Return a `receive` that ends a body that is too large or too slow."""
        num_bytes, is_whole = 0, False
        deadline = time.monotonic() + self._settings.upload_timeout_s

        async def limited() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise RequestError(
                    408, "upload_timeout", "the request did not come in time",
                    {"Connection": "close"},
                ) from None  # fmt: skip
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > self._settings.max_upload_bytes:
                if not is_whole:
                    await self._discard(receive, num_bytes)
                raise _too_large(self._settings.max_upload_bytes)
            return message

        return limited

    async def _discard(self, receive: Receive, num_bytes: int) -> None:
        """Read the rest of a body that is refused, unless it is far too large.

        Who is still sending when the connection closes does not get to read why.
        """
        most = _DISCARDED * self._settings.max_upload_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.upload_timeout_s):
                rest = 0
                while num_bytes <= most and rest <= most:
                    message = await receive()
                    rest += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return

    def _note(self, exchange: "_Exchange", seconds: float) -> None:
        route = exchange.route
        self._metrics.note_request(route, exchange.status, seconds)
        _log.info(
            json.dumps(
                {
                    "event": "request",
                    "request_id": exchange.request_id,
                    "method": exchange.scope["method"],
                    "route": route,
                    "status": exchange.status,
                    "seconds": round(seconds, 4),
                    "client": exchange.scope["client"][0] if exchange.scope.get("client") else None,
                }
            )
        )


class _Exchange:
    """A request with its id and what is answered."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope, self._send = scope, send
        self._given: MutableMapping[bytes, bytes] = dict(scope["headers"])
        named = self.header(b"x-request-id").decode("latin-1")
        self.request_id = named if _REQUEST_ID.fullmatch(named) else uuid.uuid4().hex
        scope["request_id"] = self.request_id
        # 499, as nginx has it: the client left before there was an answer.
        self.status = 499

    @property
    def num_bytes(self) -> int:
        """How large the body is said to be."""
        length = self.header(b"content-length")
        return int(length) if length.isdigit() else 0

    def header(self, name: bytes) -> bytes:
        return self._given.get(name, b"")

    @property
    def route(self) -> str:
        """The route's pattern, not the path: that could be anything."""
        found: Any = self.scope.get("route")
        return str(getattr(found, "path", "other"))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {**_HEADERS, "x-request-id": self.request_id}
            if self.route in ("/", "/page/{file}"):
                own["content-security-policy"] = PAGE_POLICY
            present = {name.lower() for name, _ in message.get("headers", [])}
            message["headers"] = [
                *message.get("headers", []),
                *(
                    (name.encode(), value.encode())
                    for name, value in own.items()
                    if name.encode() not in present
                ),
            ]
        await self._send(message)


def cors_options(origins: Sequence[str]) -> dict[str, Any]:
    """Return what pages of other sites may do."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["Authorization", "X-Request-Id"],
        "expose_headers": ["X-Request-Id", "Retry-After"],
    }


def _too_large(most: int) -> RequestError:
    return RequestError(
        413, "too_large", f"the request is larger than {most} bytes", {"Connection": "close"}
    )


def _whole_seconds(seconds: float) -> int:
    return max(1, int(seconds + 0.999))
