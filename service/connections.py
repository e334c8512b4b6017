"""Connections of the API: uvicorn's, with an end to patience and to the size of a head.

By itself it waits for ever for the rest of a request, and takes a head of any size. What it cannot read at
all is answered with a problem, like everything else.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.problems import MEDIA_TYPE, document


class Connection(HttpToolsProtocol):
    """One connection. The limits are those of a client that means well, on a poor line."""

    head_limit = 64 << 10
    """Most bytes of the first line and the headers of a request, give or take what arrives at once."""
    head_seconds = 30.0
    """So long a head may take, and a connection stay silent at its beginning."""
    silent_seconds = 60.0
    """So long nothing may come of a body, or of the next request, while something is waited for."""
    look_seconds = 5.0

    _in_head = True
    _head_bytes = 0
    _head_since = 0.0
    _heard = 0.0
    _watch: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._head_since = self._heard = self.loop.time()
        self._watch = self.loop.call_later(self.look_seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something came."""
        self._heard = self.loop.time()
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.head_limit:
                told = f"the first line and the headers have more than {self.head_limit} bytes"
                self._refuse(431, "headers_too_large", told)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._head_bytes, self._head_since = True, 0, self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no request."""
        self._refuse(400, "bad_request", "the request is not valid HTTP")

    def _look(self) -> None:
        moment = self.loop.time()
        if self._in_head:
            late = moment - self._head_since > self.head_seconds
        elif self.flow.read_paused:  # it is the service that is slow
            self._heard, late = moment, False
        else:
            waiting = self.cycle is None or self.cycle.response_complete or self.cycle.more_body
            late = waiting and moment - self._heard > self.silent_seconds
        if late:
            self.transport.close()
        else:
            self._watch = self.loop.call_later(self.look_seconds, self._look)

    def _refuse(self, status: int, code: str, detail: str) -> None:
        body = json.dumps(document(status, code, detail)).encode()
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"content-type: {MEDIA_TYPE}",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
