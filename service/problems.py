"""Problem documents (RFC 9457): the one form of every error, in answers and in records of merges."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from merging.errors import InputError, MergeError
from service.errors import ServiceError, Unavailable

MEDIA_TYPE = "application/problem+json"


def document(
    status: int,
    code: str,
    detail: str,
    *,
    instance: str | None = None,
    remedy: str | None = None,
    errors: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The members of a problem."""
    body: dict[str, Any] = {
        "type": f"urn:merganser:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
        "errors": errors or [],
    }
    if instance is not None:
        body["instance"] = instance
    if remedy is not None:
        body["remedy"] = remedy
    return body


def status_of(error: MergeError) -> int:
    """The HTTP status of a deliberate error."""
    if isinstance(error, ServiceError | Unavailable):
        return error.status
    return 422 if isinstance(error, InputError) else 500


def describe(error: MergeError) -> dict[str, Any]:
    """A deliberate error as a problem that is kept with a failed merge."""
    return document(status_of(error), error.code, error.message, remedy=error.remedy, errors=errors_of(error))


def errors_of(error: MergeError) -> list[dict[str, Any]]:
    """Where a deliberate error lies, as items of a problem."""
    if not error.where:
        return []
    item: dict[str, Any] = {"detail": error.message, "kind": error.code}
    field = error.where.get("field")
    if field:
        item["pointer"] = "/" + "/".join(re.findall(r"[^.\[\]]+", field))
    item.update({key: value for key, value in sorted(error.where.items()) if key != "field"})
    return [item]
