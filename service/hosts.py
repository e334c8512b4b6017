"""Refuse requests that reach an open loopback API under a foreign name (DNS rebinding)."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from service.problems import problem
from service.settings import Settings, is_loopback


class HostCheck:
    """Middleware for a service without keys: the Host header must name this machine or ``public_url``."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._public = urlsplit(settings.public_url).hostname if settings.public_url else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        response = problem(
            421,
            "host_not_allowed",
            "this service listens for its own machine only, and was addressed by another name",
            remedy="Use http://127.0.0.1, or set MERGANSER_PUBLIC_URL",
        )
        await response(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        header = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        try:
            host = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        return host is not None and (is_loopback(host) or host == self._public)
