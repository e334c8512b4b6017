"""Errors as Hub clients want them: the same problems, and headers that name the kind of the error."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from merging.errors import MergeError
from service.errors import NotFound, ServiceError, Unauthorized
from service.handlers import problem
from service.problems import errors_of, status_of

_BAD_TOKEN = "Invalid credentials in Authorization header"
"""Clients take any other 401 for a repository that does not exist."""


class Missing(NotFound):
    """A repository, revision or entry that does not exist.

    ``kind`` is the Hub's name for it. ``commit`` tells for which commit an entry is missing; clients remember
    such a miss.
    """

    def __init__(self, kind: str, code: str, message: str, *, commit: str | None = None) -> None:
        super().__init__(code, message)
        self.hub_headers = {"X-Error-Code": kind, "X-Error-Message": _one_line(message)}
        if commit is not None:
            self.hub_headers["X-Repo-Commit"] = commit


class Outdated(ServiceError):
    """The commit was made for a revision that is no longer the newest."""

    status = 412


class HubRoute(APIRoute):
    """A route whose refusals carry the headers of the Hub."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of the route, with those headers."""
        handle = super().get_route_handler()

        async def translated(request: Request) -> Response:
            try:
                return await handle(request)
            except MergeError as error:
                if status_of(error) >= 500:
                    raise
                return problem(
                    status_of(error),
                    error.code,
                    error.message,
                    instance=request.url.path,
                    remedy=error.remedy,
                    errors=errors_of(error),
                    headers=_headers(error),
                )

        return translated


def _headers(error: MergeError) -> dict[str, str]:
    if isinstance(error, Missing):
        return error.hub_headers
    headers = dict(error.headers) if isinstance(error, ServiceError) else {}
    if isinstance(error, Unauthorized):
        return {**headers, "X-Error-Message": _BAD_TOKEN}
    told = f"{error.message}. {error.remedy}" if error.remedy else error.message
    return {**headers, "X-Error-Message": _one_line(f"{error.code}: {told}")}


def _one_line(message: str) -> str:
    """A message that fits into a header."""
    printable = "".join(char if " " <= char <= "~" else "?" for char in message)
    return printable[:500]
