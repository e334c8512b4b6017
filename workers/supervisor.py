"""One worker process for each device: start it, start it again when it dies, stop it in the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from service.broker import TRANSIENT, connect
from service.errors import Unavailable
from service.jobs import Jobs
from service.logs import configure
from service.scratch import sweep
from service.settings import Settings
from service.sizes import served_with
from service.storage import Storage
from workers import devices, memory
from workers import environment as env
from workers.housekeeper import Housekeeper
from workers.reaper import Reaper

_POLL_SECONDS = 0.1
_SWEEP_SECONDS = 1.0
_QUIET_SECONDS = 5.0
"""After an outage of Redis, workers get so long to be heard of again before they are taken for dead."""
_BACKOFF_SECONDS = (0.1, 0.5, 2.0, 10.0, 30.0)
_STABLE_SECONDS = 60.0
_log = logging.getLogger("merganser.supervisor")


@dataclass
class _Seat:
    """A device and the process that serves it at the moment."""

    device: devices.Device
    memory: int
    process: subprocess.Popen[bytes] | None = None
    name: str = ""
    started: float = 0.0
    failures: int = 0
    due: float = field(default_factory=time.monotonic)


class Supervisor:
    """Keeps one worker on each device while :meth:`run` runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        found = devices.parse(settings.devices)
        self._seats = [_Seat(device, memory.of(device, found, settings)) for device in found]
        self._redis = connect(settings)
        storage = Storage.open(settings.storage_location)
        storage.require()
        self._reaper = Reaper(self._redis, Jobs(self._redis, storage))
        self._housekeeper = Housekeeper(settings, self._redis, storage)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that run."""
        return [seat.process.pid for seat in self._seats if seat.process]

    def succeed(self) -> None:
        """Free at once what the workers of a predecessor held, all of which died with it."""
        self._reaper.free_all()

    async def run(self, stop: asyncio.Event, *, grace: float) -> None:
        """Supervise until ``stop``; running merges then get ``grace`` seconds, and are queued again."""
        loops = [
            asyncio.create_task(self._repeat(stop, self._tidy)),
            asyncio.create_task(self._repeat(stop, self._housekeeper.sweep)),
        ]
        try:
            while not stop.is_set():
                for seat in self._seats:
                    await self._tend(seat)
                await _wait(stop, _POLL_SECONDS)
        finally:
            self._housekeeper.stop()
            await self._stop_all(grace)
            for loop in loops:
                loop.cancel()
            self._redis.close()

    async def _tend(self, seat: _Seat) -> None:
        if seat.process is not None and seat.process.poll() is not None:
            await self._bury(seat)
        if seat.process is None and time.monotonic() >= seat.due:
            self._start(seat)

    def _start(self, seat: _Seat) -> None:
        """Start a worker. Called from the main thread, whose end is what the worker watches for."""
        seat.name = f"{socket.gethostname()}-{seat.device.label}-{uuid.uuid4().hex[:8]}"
        cpus = sum(other.device.kind == "cpu" for other in self._seats)
        more = {
            env.SUPERVISOR_PID: str(os.getpid()),
            env.WORKER_NAME: seat.name,
            env.DEVICE: seat.device.kind,
            env.MEMORY: str(seat.memory),
            "CUDA_VISIBLE_DEVICES": seat.device.gpu,
        }
        if cpus > 1 and seat.device.kind == "cpu":
            more[env.THREADS] = str(max(1, (os.cpu_count() or 1) // cpus))
        seat.process = subprocess.Popen(
            [sys.executable, "-m", "workers.process"],
            env=env.child(self._settings, **more),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        seat.started = time.monotonic()
        classes = ", ".join(str(size) for size in served_with(seat.memory))
        _log.info("started worker %s, process %d, for merges of %s GB", seat.name, seat.process.pid, classes)

    async def _bury(self, seat: _Seat) -> None:
        assert seat.process is not None
        _log.warning("worker %s ended with status %s", seat.name, seat.process.returncode)
        seat.process = None
        lived = time.monotonic() - seat.started
        seat.failures = 0 if lived > _STABLE_SECONDS else seat.failures + 1
        pause = _BACKOFF_SECONDS[min(seat.failures, len(_BACKOFF_SECONDS)) - 1] if seat.failures else 0.0
        seat.due = time.monotonic() + pause
        await self._free(seat.name)

    async def _free(self, name: str, *, blameless: bool = False) -> None:
        try:
            await asyncio.to_thread(self._reaper.free, name, blameless=blameless)
        except TRANSIENT as error:
            _log.warning("could not free what %s held; its heartbeat will expire: %s", name, error)

    def _tidy(self) -> None:
        sweep(self._settings.scratch_dir)
        self._reaper.sweep()

    async def _repeat(self, stop: asyncio.Event, work: Callable[[], None]) -> None:
        while not stop.is_set():
            pause = _SWEEP_SECONDS
            try:
                await asyncio.to_thread(work)
            except TRANSIENT as error:
                _log.warning("redis cannot be reached: %s", error)
                pause = _QUIET_SECONDS
            except Unavailable as error:
                _log.warning("%s", error)
            except Exception:
                _log.exception("%s failed", work.__qualname__)
            await _wait(stop, pause)

    async def _stop_all(self, grace: float) -> None:
        running = [seat for seat in self._seats if seat.process]
        for seat in running:
            _signal(seat, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(s.process and s.process.poll() is None for s in running):
            await asyncio.sleep(0.02)
        for seat in running:
            assert seat.process is not None
            forced = seat.process.poll() is None
            if forced:
                _signal(seat, signal.SIGKILL)  # its work-horse goes with it
            await asyncio.to_thread(seat.process.wait)
            if forced:
                await self._free(seat.name, blameless=True)


def _signal(seat: _Seat, number: signal.Signals) -> None:
    assert seat.process is not None
    if seat.process.poll() is None:
        seat.process.send_signal(number)


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return


def run_worker(settings: Settings) -> int:
    """Run the workers of this machine until SIGTERM or SIGINT."""
    configure()
    supervisor = Supervisor(settings)

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await supervisor.run(stop, grace=settings.drain_seconds)

    asyncio.run(run())
    return 0
