"""Run the real thing in tests: `merganser up` as a process, and a look at the processes it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import redis

from service.client import Client

ROOT = Path(__file__).resolve().parents[1]


class Up:
    """Everything, started by one command in a folder of its own."""

    def __init__(self, data: Path, **settings: str) -> None:
        self.data = data
        self.settings = settings
        self.start()

    def start(self) -> None:
        self.state.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),  # this checkout, whatever is installed
            "MERGANSER_PORT": "0",
            "MERGANSER_DATA_DIR": str(self.data),
            "MERGANSER_DEVICES": "cpu",
            "MERGANSER_HF_ENDPOINTS": "",  # tests stay on this machine
            **{f"MERGANSER_{name.upper()}": value for name, value in self.settings.items()},
        }
        self.data.mkdir(parents=True, exist_ok=True)
        with (self.data / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workers", "up", "--debug"],
                env=environment,
                cwd=self.data,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self.state.exists() or self.process.poll() is not None, what="the service is ready")
        assert self.process.poll() is None, self.log()
        self.url: str = json.loads(self.state.read_text())["url"]
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    @property
    def state(self) -> Path:
        return self.data / "server.json"

    @property
    def storage(self) -> Path:
        return self.data / "storage"

    def log(self) -> str:
        return (self.data / "up.log").read_text()

    def client(self) -> Client:
        return Client(self.url)

    def redis(self) -> redis.Redis:
        sockets = [self.data / "redis" / "redis.sock"]
        return redis.Redis(unix_socket_path=str(sockets[0]))

    def pid_of(self, *words: str) -> int:
        """The process id of the one descendant whose command line holds all words."""
        found = [pid for pid in descendants(self.process.pid) if all(word in command(pid) for word in words)]
        assert len(found) == 1, [(pid, command(pid)) for pid in descendants(self.process.pid)]
        return found[0]

    def horse(self) -> int:
        """The process id of the work-horse that runs."""
        return self.pid_of("workers.horse")

    def stop(self, *, patience: float = 15.0) -> int:
        """Stop in order; the exit status."""
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(patience)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def until(condition: Callable[[], Any], *, what: str, patience: float = 30.0) -> Any:
    """Wait until ``condition`` gives something; fail after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {patience} s: {what}"
        time.sleep(0.02)
    return found


def command(pid: int) -> str:
    """The command line of a process, or nothing."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The living children of a process, their children, and so on."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = [pid]
    for ancestor in found:
        found.extend(child for child, parent in parents.items() if parent == ancestor)
    return found[1:]


def push(client: Client, folder: Path, model: str) -> str:
    """Upload an adapter; ``ns/name@revision``."""
    revision = client.push_dir(folder, model)
    return f"{model}@{revision['revision']}"
