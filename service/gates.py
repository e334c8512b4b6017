"""What a request must pass before anything else looks at it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from service.handlers import problem
from service.settings import Settings, is_loopback

BODY_LIMIT = 2 << 20
"""Most bytes of a JSON body; uploads of files have their own limit."""
COMMIT_LIMIT = 1 << 30
"""Most bytes of a commit of the Hub's protocol, which holds its files."""

_COMMIT = re.compile(r"^/hf/api/models/[^/]+/[^/]+/commit/[^/]+$")


def _header(scope: Scope, name: bytes) -> str:
    return next((value for key, value in scope["headers"] if key == name), b"").decode("latin-1")


class HostGate:
    """A service without keys answers to the names of this machine and of ``public_url`` only.

    Otherwise a web page could reach it through a name of its own that resolves to 127.0.0.1. For the same
    reason it takes nothing from pages of other origins: a browser sends a POST of plain text without asking.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._public = urlsplit(settings.public_url).hostname if settings.public_url else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origin = _header(scope, b"origin")
        hosts = [value for key, value in scope["headers"] if key == b"host"]
        if len(hosts) != 1 or not self._allowed("//" + hosts[0].decode("latin-1")):
            response = problem(
                421,
                "host_not_allowed",
                "this service listens for its own machine only, and was addressed by another name",
                remedy="Use http://127.0.0.1, or set MERGANSER_PUBLIC_URL",
            )
            await response(scope, receive, send)
        elif origin and not self._allowed(origin):
            response = problem(
                403,
                "origin_not_allowed",
                "this service has no keys, and takes no requests from pages of other origins",
                remedy="Run it with keys, or set MERGANSER_PUBLIC_URL",
            )
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allowed(self, address: str) -> bool:
        try:
            host = urlsplit(address).hostname
        except ValueError:
            return False
        return host is not None and (is_loopback(host) or host == self._public)


class LengthGate:
    """A body that announces more than a document may have is refused; only uploads of files may have more.

    Bodies without a length are counted while they stream, by the routes that read one.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "PUT":
            length = _header(scope, b"content-length")
            limit = COMMIT_LIMIT if _COMMIT.match(scope["path"]) else self._limit
            if length.isdecimal() and int(length) > limit:
                response = problem(
                    413,
                    "too_large",
                    f"the body has {length} bytes; the limit is {limit}",
                    instance=scope["path"],
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
