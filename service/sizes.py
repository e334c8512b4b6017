"""Memory classes: which workers a merge fits on, and the move to larger ones when it did not.

A merge belongs to the smallest class that holds what its plan says it needs. A worker serves the classes up
to its own memory, the largest first. The smallest class is served by every worker.
"""

from __future__ import annotations

import json

import redis

from service import transitions
from service.broker import SIZES, queue_name, text, transition_keys
from service.clock import now

GB = 10**9
_USABLE = 0.9
"""The share of a worker's memory that a merge may have; the rest is for the process around it."""


def usable(memory: float) -> int:
    """Bytes that a merge may need on a worker with ``memory`` bytes."""
    return int(_USABLE * memory)


def size_for(need: int) -> int:
    """The class (GB) of a merge that needs so many bytes; the largest one holds all that is beyond it."""
    return next((size for size in SIZES if need <= usable(size * GB)), SIZES[-1])


def served_with(memory: int) -> tuple[int, ...]:
    """The classes that a worker with so many bytes serves, the largest first."""
    return tuple(size for size in reversed(SIZES) if size * GB <= memory or size == SIZES[0])


def served(connection: redis.Redis) -> list[int]:
    """The classes that some worker serves at the moment, the smallest first."""
    with connection.pipeline(transaction=False) as pipe:
        for size in SIZES:
            pipe.smembers(f"rq:workers:{queue_name('normal', size)}")
        registered = [sorted(text(name) for name in names) for names in pipe.execute()]
    alive = _alive(connection, sorted({name for some in registered for name in some}))
    return [size for size, some in zip(SIZES, registered, strict=True) if alive.intersection(some)]


def workers(connection: redis.Redis) -> int:
    """How many workers there are. A machine that lost its power has not taken its workers off the list."""
    return len(_alive(connection, sorted(text(name) for name in connection.smembers("rq:workers"))))


def _alive(connection: redis.Redis, names: list[str]) -> set[str]:
    """Those of some registered workers that were heard of lately."""
    with connection.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.exists(name)
        return {name for name, there in zip(names, pipe.execute(), strict=True) if there}


def move_up(
    connection: redis.Redis, tenant: str, merge_id: str, attempt: str, *, memory: int, reason: str
) -> int | None:
    """Let a merge wait for a larger worker than the one with ``memory`` bytes, where it did not fit.

    Returns its new class, or None if no worker is larger or the attempt is no longer to run. The job is to
    be queued again by the caller; an empty ``attempt`` stands for whichever is current.
    """
    above = served_with(memory)[0]
    size = next((size for size in served(connection) if size > above), None)
    if size is None:
        return None
    message = f"{reason}; it waits for a worker with {size} GB"
    data = json.dumps({"state": "queued", "at": now(), "message": message})
    script = connection.register_script(transitions.MOVE)
    arguments: list[str | int] = [attempt, usable(size * GB), message, data]
    answer = script(keys=transition_keys(tenant, merge_id), args=arguments)
    return size if text(answer) == "moved" else None
