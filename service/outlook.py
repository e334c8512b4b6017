"""What lies before a merge: its place in the queue, what holds it up, a guess at when it will end."""

from __future__ import annotations

import redis

from service.broker import PACE, QUEUES, queue_name, text
from service.clock import millis, now
from service.documents import MergeRecord
from service.sizes import served, size_for, workers

_WEIGHT = 0.3
_TELLING = 0.1
"""From this progress on, a running merge foretells its own end."""


def note(connection: redis.Redis, seconds: float) -> None:
    """A merge took so long: let it count for the pace."""
    pace = connection.get(PACE)
    before = seconds if pace is None else float(text(pace))
    connection.set(PACE, f"{before + _WEIGHT * (seconds - before):.3f}")


def ahead(connection: redis.Redis, record: MergeRecord) -> int | None:
    """How many queued merges are to be started before this one; None when it is not in a queue."""
    if record.state != "queued":
        return None
    own = queue_name(record.priority, size_for(record.memory_bytes))
    with connection.pipeline(transaction=False) as pipe:
        for name in QUEUES[: QUEUES.index(own)]:
            pipe.llen(f"rq:queue:{name}")
        pipe.lpos(f"rq:queue:{own}", record.id)
        *before, place = pipe.execute()
    return None if place is None else sum(before) + int(place)


def obstacle(connection: redis.Redis, record: MergeRecord) -> str | None:
    """Why a queued merge does not start, or None: no worker is there, or none that is large enough."""
    if record.state != "queued":
        return None
    sizes = served(connection)
    size = size_for(record.memory_bytes)
    if size in sizes:
        return None
    if not sizes:
        return "no worker is connected"
    return f"no connected worker has {size} GB of memory; the largest has {sizes[-1]} GB"


def eta(connection: redis.Redis, record: MergeRecord, before: int | None) -> float | None:
    """Seconds until a merge is likely to end, or None where nothing tells it.

    A running merge goes on as it did so far. A queued one waits for those before it, shared by the workers
    there are, each at the pace of late.
    """
    if record.state == "running" and record.started_at and record.progress >= _TELLING:
        elapsed = (millis(now()) - millis(record.started_at)) / 1000
        return round(elapsed * (1 - record.progress) / record.progress, 1)
    pace = connection.get(PACE) if before is not None else None
    if before is None or pace is None:
        return None
    return round(float(text(pace)) * (before // max(1, workers(connection)) + 1), 1)
