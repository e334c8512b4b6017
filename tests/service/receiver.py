"""A real receiver of webhooks, on loopback, that answers as a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks import Webhook


@dataclass
class Receiver:
    """What came, and where."""

    url: str
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    def verified(self, secret: str, number: int = -1) -> Any:
        """The content of a message, once the reference implementation accepts its signature."""
        headers, body = self.received[number]
        return Webhook(secret).verify(body, headers)


Answer = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """One after the other; the last one for ever."""
    left = list(answers)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return answer


@contextmanager
def receiver(answer: Answer | None = None) -> Iterator[Receiver]:
    given = answer or status(204)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            with suppress(OSError):  # whoever sent it may not wait for the answer
                given(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        found = Receiver(f"http://127.0.0.1:{httpd.server_port}/hook")
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            httpd.shutdown()
            thread.join()
