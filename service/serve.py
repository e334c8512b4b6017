"""Run the API as a server of its own, for a split deployment."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn

from merging.errors import InputError
from service.app import create_app
from service.connections import Connection
from service.settings import Settings
from service.storage import Storage

_GRACE_SECONDS = 3


class Server(uvicorn.Server):
    """uvicorn, which leaves the signals to its owner and closes event streams when it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Not here: uvicorn would raise the signal again after shutdown and so cut off the cleanup."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End open event streams, then the connections, then the application."""
        app = self.config.app
        services = getattr(getattr(app, "state", None), "services", None)
        if services is not None:
            services.closing.set()
        await super().shutdown(sockets)


def listen(settings: Settings) -> socket.socket:
    """The listening socket; port 0 takes a free one. Raises ``address_unavailable``."""
    host = settings.host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. Without it, the body of an answer waits 40 ms for the client to acknowledge
        # the headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
    except OSError as error:
        raise InputError(
            "address_unavailable",
            f"cannot listen on {host}:{settings.port}: {error.strerror or error}",
            remedy="Choose another port, or 0 for any free one",
            where={"field": "MERGANSER_PORT"},
        ) from error
    listener.listen(2048)
    listener.set_inheritable(False)
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(settings: Settings) -> Server:
    """The server of the API; ``await server.serve(sockets=[...])`` runs it."""
    # Event-loop threads of the object store must be quiet when the interpreter goes away.
    atexit.register(time.sleep, 0.1)
    config = uvicorn.Config(
        create_app(settings),
        lifespan="on",
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=30,
        ws="none",
    )
    return Server(config)


def run_serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises :class:`InputError` if it cannot start."""
    from service.broker import connect
    from service.logs import configure

    configure()
    connect(settings).close()  # names a missing setting before anything is opened
    Storage.open(settings.storage_location).require()
    listener = listen(settings)
    server = make_server(settings)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, setattr, server, "should_exit", True)
        await server.serve(sockets=[listener])

    with contextlib.closing(listener):
        asyncio.run(run())
