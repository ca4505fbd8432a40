"""Errors as clients get them: a status, a short code, a sentence, and the request's id."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_log = logging.getLogger(__name__)

INTERNAL = "the server failed at this request; its log has the reason under this id"
_CODES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "upload_timeout",
    413: "too_large",
    415: "unsupported_format",
    422: "invalid_request",
    429: "busy",
    503: "unavailable",
    504: "timeout",
}


class RequestError(HTTPException):
    """What a client did wrong, or must wait for.

    code  short and stable, for programs; the message is for people
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code


def error_body(code: str, message: str, request_id: str) -> dict[str, Any]:
    """Return the JSON of an error."""
    return {"error": {"code": code, "message": message, "request_id": request_id}}


def request_id_of(request: Request) -> str:
    """Return the id that the request was given on its way in."""
    return str(request.scope.get("request_id", ""))


def install(app: FastAPI) -> None:
    """Let an app answer every error in one shape."""

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = getattr(error, "code", _CODES.get(error.status_code, "error"))
        body = error_body(code, str(error.detail), request_id_of(request))
        return JSONResponse(body, error.status_code, headers=error.headers)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        told = "; ".join(_sentence(one) for one in error.errors())
        body = error_body("invalid_request", told, request_id_of(request))
        return JSONResponse(body, 422)

    async def on_other(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("internal", INTERNAL, request_id_of(request)), 500)

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_other)


def _sentence(error: Mapping[str, Any]) -> str:
    """Say what is wrong with a field, without the value: it may be long, or hold anything."""
    place = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path"))
    return f"{place or 'the request'}: {error['msg']}"
