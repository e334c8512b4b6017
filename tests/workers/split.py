"""The split deployment for tests: a Redis, an API and workers, each a process that can be killed alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import httpx
import redis

from service.client import Client
from service.embedded_redis import DataLock, EmbeddedRedis
from service.serve import listen
from service.settings import load_settings
from tests.running import ROOT, command, descendants, until


class Split:
    """Processes of one deployment in a folder. Nothing is started but the Redis."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.data = folder / "data"
        self.storage = folder / "objects"
        self._lock = DataLock(folder / "server")
        self.server = EmbeddedRedis(folder / "server", self._lock)
        self.server.start()
        with listen(load_settings(port=0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / "log"
        self._running: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MERGANSER_REDIS_URL": self.server.url,
            "MERGANSER_STORAGE_URL": self.storage.as_uri(),
            "MERGANSER_DATA_DIR": str(self.data),
            "MERGANSER_DEVICES": "cpu",
            "MERGANSER_PORT": str(port),
            **{f"MERGANSER_{name.upper()}": value for name, value in settings.items()},
        }

    def serve(self) -> subprocess.Popen[bytes]:
        """Start the API and wait until it answers."""
        process = self._start("service", "serve")
        until(self._answers, what="the API answers")
        return process

    def work(self) -> subprocess.Popen[bytes]:
        """Start a supervisor with one worker and wait until that is registered."""
        with self.redis() as connection:
            before = connection.scard("rq:workers")
            process = self._start("workers", "worker")
            until(lambda: connection.scard("rq:workers") > before, what="the worker is registered")
        return process

    def redis(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.server.socket))

    def client(self) -> Client:
        return Client(self.url)

    def log(self) -> str:
        return self._log.read_text()

    def horse(self) -> int:
        """The process id of the work-horse that runs."""
        (found,) = [
            pid
            for process in self._running
            for pid in descendants(process.pid)
            if "workers.horse" in command(pid)
        ]
        return found

    def stop(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()
        self.server.stop()
        self._lock.release()

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words], env=self._environment, stdout=log, stderr=log
            )
        self._running.append(process)
        return process

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", trust_env=False).status_code == 200
        return False
