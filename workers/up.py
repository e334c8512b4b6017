"""Everything on this machine in one command: Redis, storage, API, and one worker for each device."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from merging import __version__
from merging.errors import MergeFailure
from service.broker import connect
from service.embedded_redis import DataLock, EmbeddedRedis
from service.logs import configure
from service.serve import Server, listen, make_server, url_of
from service.settings import Settings
from workers.supervisor import Supervisor

Ready = Callable[[str], None]
"""Called with the URL when the API answers and a worker waits for work."""

STATE_FILE = "server.json"
_WORKER_GRACE_SECONDS = 2.0
_READY_SECONDS = 60.0
_POLL_SECONDS = 0.2
_log = logging.getLogger("merganser.up")


def run_up(settings: Settings, ready: Ready | None = None) -> int:
    """Run everything until SIGTERM or SIGINT, then take everything down.

    When this process is killed, the kernel takes its children down. ``data_dir/server.json`` holds the URL
    while the service is ready.
    """
    configure(logging.WARNING)
    lock = DataLock(settings.data_dir)
    state = settings.data_dir / STATE_FILE
    state.unlink(missing_ok=True)
    embedded = None if settings.redis_url else EmbeddedRedis(settings.data_dir, lock)
    try:
        with contextlib.closing(listen(settings)) as listener:
            if embedded is not None:
                embedded.start()
                settings = settings.with_redis(embedded.url)
            return asyncio.run(_Machine(settings, listener, embedded).run(state, ready))
    finally:
        state.unlink(missing_ok=True)
        if embedded is not None:
            embedded.stop()
        lock.release()


class _Machine:
    """The parts that run side by side. If one of them ends by itself, all of them end."""

    def __init__(self, settings: Settings, listener: socket.socket, embedded: EmbeddedRedis | None) -> None:
        self._settings = settings
        self._listener = listener
        self._embedded = embedded
        self._url = settings.public_url or url_of(listener)
        self._stop = asyncio.Event()

    async def run(self, state: Path, ready: Ready | None) -> int:
        """Run the parts until the first of them ends or a signal comes, then end all of them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        server = make_server(self._settings)
        supervisor = Supervisor(self._settings)
        if self._embedded is not None:  # nobody else can have workers on it
            supervisor.succeed()
        results = await asyncio.gather(
            self._ends_all(server.serve(sockets=[self._listener])),
            self._ends_all(supervisor.run(self._stop, grace=_WORKER_GRACE_SECONDS)),
            self._ends_all(self._keep_redis()),
            self._ends_all(self._announce(server, state, ready)),
            self._close(server),
            return_exceptions=True,
        )
        failures = [item for item in results if isinstance(item, BaseException)]
        if failures:
            raise failures[0]
        return 0

    async def _ends_all(self, part: Coroutine[Any, Any, None]) -> None:
        try:
            await part
        finally:
            self._stop.set()

    async def _close(self, server: Server) -> None:
        await self._stop.wait()
        server.should_exit = True

    async def _keep_redis(self) -> None:
        """Start the embedded server again if it dies; its append-only file brings everything back."""
        while not self._stop.is_set():
            if self._embedded is not None and not self._embedded.alive:
                _log.warning("the embedded Redis died; starting it again")
                self._embedded.spawn()  # here, because it lives as long as the thread that starts it
                await asyncio.to_thread(self._embedded.await_ready)
            await self._pause(_POLL_SECONDS)

    async def _announce(self, server: Server, state: Path, ready: Ready | None) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not (server.started and await asyncio.to_thread(self._has_worker)):
            if self._stop.is_set():
                return
            if time.monotonic() > deadline:
                raise MergeFailure("start_timeout", "no worker was ready in time")
            await self._pause(0.05)
        text = json.dumps({"url": self._url, "pid": os.getpid(), "version": __version__})
        draft = state.with_suffix(".part")
        draft.write_text(text + "\n", encoding="utf-8")
        draft.chmod(0o600)
        draft.replace(state)
        if ready is not None:
            ready(self._url)
        await self._stop.wait()

    def _has_worker(self) -> bool:
        with connect(self._settings) as connection:
            return bool(connection.scard("rq:workers"))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
