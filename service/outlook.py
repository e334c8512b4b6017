"""What lies before a merge: its place in the queue, and a guess at when it will end."""

from __future__ import annotations

from typing import Any

import redis

from service.broker import PACE, PRIORITIES, QUEUES, text
from service.clock import millis, now
from service.documents import MergeRecord

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
    count = 0
    for priority, name in zip(PRIORITIES, QUEUES, strict=True):
        key = f"rq:queue:{name}"
        if priority == record.priority:
            place: Any = connection.lpos(key, record.id)
            return None if place is None else count + int(place)
        count += connection.llen(key)
    return None


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
    workers = max(1, connection.scard("rq:workers"))
    return round(float(text(pace)) * (before // workers + 1), 1)
