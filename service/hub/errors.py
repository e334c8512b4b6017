"""Errors as Hub clients want them: the same problems, and headers that name the kind of the error."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.errors import Forbidden, NotFound, Unauthorized
from service.handlers import problem

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


class HubRoute(APIRoute):
    """A route whose refusals carry the headers of the Hub."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler of the route, with those headers."""
        handle = super().get_route_handler()

        async def translated(request: Request) -> Response:
            try:
                return await handle(request)
            except (Missing, Unauthorized, Forbidden) as error:
                if isinstance(error, Missing):
                    headers = error.hub_headers
                elif isinstance(error, Unauthorized):
                    headers = {"X-Error-Message": _BAD_TOKEN, "WWW-Authenticate": 'Bearer realm="merganser"'}
                else:
                    headers = {"X-Error-Message": _one_line(error.message)}
                return problem(
                    error.status,
                    error.code,
                    error.message,
                    instance=request.url.path,
                    remedy=error.remedy,
                    headers=headers,
                )

        return translated


def _one_line(message: str) -> str:
    """A message that fits into a header."""
    printable = "".join(char if " " <= char <= "~" else "?" for char in message)
    return printable[:300]
