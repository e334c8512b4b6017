"""What every request leaves behind: an id, a line in the log, counts for Prometheus."""

from __future__ import annotations

import logging
import re
import secrets
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logs import event, request_id

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the histogram of request times, in seconds."""
_ID = re.compile(rb"^[A-Za-z0-9._-]{1,64}$")
_QUIET = ("/healthz", "/readyz", "/metrics")
_log = logging.getLogger("merganser.access")


@dataclass
class RequestCounts:
    """Counts of one process since it started. Only the event loop touches them."""

    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    """By method, path pattern and status."""
    buckets: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By path pattern and index into ``BUCKETS``; the index after the last one is everything longer."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    received: int = 0
    sent: int = 0

    def add(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request that has been answered."""
        self.requests[method, path, status] += 1
        self.buckets[path, bisect_left(BUCKETS, seconds)] += 1
        self.seconds[path] += seconds


class Telemetry:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, counts: RequestCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        current = given.decode() if _ID.match(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state["request_id"] = current
        token = request_id.set(current)
        status = 500
        started = time.perf_counter()

        async def counted_receive() -> Message:
            message = await receive()
            self._counts.received += len(message.get("body", b""))
            return message

        async def marked_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = current
                for name, value in state.get("rate_headers", {}).items():
                    headers[name] = value
            self._counts.sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, marked_send)
        finally:
            seconds = time.perf_counter() - started
            pattern = _pattern(scope)
            self._counts.add(scope["method"], pattern, status, seconds)
            event(
                _log,
                logging.DEBUG if pattern in _QUIET else logging.INFO,
                f"{scope['method']} {scope['path']} {status}",
                method=scope["method"],
                path=scope["path"],
                status=status,
                milliseconds=round(seconds * 1000, 1),
                tenant=state.get("tenant"),
            )
            request_id.reset(token)


def _pattern(scope: Scope) -> str:
    """The path with its parameters named, so that there are few of them."""
    route = scope.get("route")
    path = getattr(route, "path_format", None) or getattr(route, "path", None)
    return str(path) if path else "unmatched"
