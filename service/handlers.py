"""Answer every error of the API with a problem."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from merging.errors import MergeError
from service.broker import TRANSIENT
from service.errors import ServiceError, Unavailable
from service.problems import MEDIA_TYPE, document, errors_of, status_of

_log = logging.getLogger("merganser.api")
_CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    406: "not_acceptable",
    411: "length_required",
    413: "too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    431: "headers_too_large",
}


_NOT_PARSED = ("dict_type", "model_attributes_type")
"""The errors for a body that was left as it came."""


class ProblemResponse(JSONResponse):
    """A problem document."""

    media_type = MEDIA_TYPE


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    instance: str | None = None,
    remedy: str | None = None,
    errors: list[dict[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> ProblemResponse:
    """A problem response. ``instance`` is the path of the request."""
    body = document(status, code, detail, instance=instance, remedy=remedy, errors=errors)
    return ProblemResponse(body, status_code=status, headers=dict(headers or {}))


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem."""
    app.add_exception_handler(MergeError, _deliberate)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in TRANSIENT:
        app.add_exception_handler(kind, _redis_away)
    app.add_exception_handler(Exception, _unexpected)


async def _deliberate(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, MergeError)
    headers = dict(error.headers) if isinstance(error, ServiceError) else {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = "2"
    return problem(
        status_of(error),
        error.code,
        error.message,
        instance=request.url.path,
        remedy=error.remedy,
        errors=errors_of(error),
        headers=headers,
    )


async def _invalid(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, RequestValidationError)
    errors = []
    malformed = False
    sent = request.headers.get("content-type", "")
    for item in error.errors():
        source, *path = [str(part) for part in item["loc"]] or ["body"]
        kind = item["type"]
        malformed = malformed or kind in ("json_invalid", "json_type")
        if kind == "json_invalid":
            path = []
        entry = {"detail": item["msg"], "kind": kind, "in": source}
        errors.append({**entry, "pointer": "/" + "/".join(path)} if source == "body" else entry)
        if source != "body":
            errors[-1]["parameter"] = ".".join(path)
    first = errors[0]
    if first.get("pointer") == "/" and first["kind"] in _NOT_PARSED and "json" not in sent:
        return problem(
            415, "unsupported_media_type", "the body is not marked as JSON", instance=request.url.path,
            remedy="Send the header Content-Type: application/json",
        )  # fmt: skip
    place = first.get("parameter") or first.get("pointer", "/")
    if malformed:
        return problem(
            400, "body_not_json", f"the body is not valid JSON: {first['detail']}",
            instance=request.url.path, errors=errors,
        )  # fmt: skip
    return problem(
        422, "request_invalid", f"{place}: {first['detail']}", instance=request.url.path, errors=errors
    )


async def _http(request: Request, error: Exception) -> ProblemResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    status = error.status_code
    detail = str(error.detail)
    if status == 405:
        headers["Allow"] = ", ".join(allowed_methods(request))
        detail = f"{request.method} is not possible here; use {headers['Allow']}"
    elif status == 404 and detail == "Not Found":
        detail = f"there is nothing at {request.url.path[:200]}"
    elif status == 413:
        detail = "the body is larger than this resource accepts"
    code = _CODES.get(status, f"http_{status}")
    return problem(status, code, detail, instance=request.url.path, headers=headers)


def allowed_methods(request: Request) -> list[str]:
    """The methods for which some route takes the path; Starlette names those of the first route only."""
    routes = request.app.routes
    return [
        method
        for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _redis_away(request: Request, error: Exception) -> ProblemResponse:
    _log.warning("redis cannot be reached: %s", error)
    return problem(
        503,
        "redis_unavailable",
        "the job store cannot be reached at the moment",
        instance=request.url.path,
        remedy="Try again in a few seconds",
        headers={"Retry-After": "2"},
    )


async def _unexpected(request: Request, error: Exception) -> ProblemResponse:
    _log.error("unexpected error in %s %s", request.method, request.url.path, exc_info=error)
    return problem(
        500,
        "internal_error",
        "an unexpected error happened; it has been logged",
        instance=request.url.path,
    )
