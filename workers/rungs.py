"""Where a merge is tried in turn on one worker: as it is meant to be, and with less and less memory."""

from __future__ import annotations

import os
from dataclasses import dataclass

from service.sizes import usable
from workers import environment as env
from workers import memory

_PROCESS_BYTES = 300 << 20
"""What an idle process with torch has, which the plan's estimate includes."""


class MovedUp(Exception):
    """The merge did not fit here and waits for a larger worker; RQ is to queue its job again."""


@dataclass(frozen=True)
class Rung:
    """A device of the engine and its number of threads; None: the engine's choice."""

    device: str
    threads: int | None

    def __str__(self) -> str:
        if self.device == "cuda":
            return "the GPU"
        return "the CPU" if self.threads != 1 else "the CPU with one thread"


def rungs(need: int) -> tuple[Rung, ...]:
    """The rungs of this worker for a merge that is thought to need so many bytes, the best first.

    On a CPU each thread works on modules of its own, so fewer threads need less memory. On a GPU worker
    the CPU is the way out.
    """
    device = os.environ.get(env.DEVICE, "auto")
    threads = _threads()
    if device != "cpu":
        return Rung(device, threads), Rung("cpu", _fitting(threads, need, memory.machine())), Rung("cpu", 1)
    first = _fitting(threads, need, worker_memory())
    return (Rung("cpu", first),) if first == 1 else (Rung("cpu", first), Rung("cpu", 1))


def worker_memory() -> int:
    """The bytes of this process's worker."""
    return int(os.environ.get(env.MEMORY) or memory.machine())


def _threads() -> int | None:
    given = os.environ.get(env.THREADS)
    return int(given) if given else None


def _fitting(threads: int | None, need: int, available: int) -> int | None:
    """As many threads as fit, at most ``threads``."""
    from merging.engine import default_threads

    most = threads or default_threads()
    each = max(1, need - _PROCESS_BYTES)
    return max(1, min(most, (usable(available) - _PROCESS_BYTES) // each))
