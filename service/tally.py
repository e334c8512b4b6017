"""Counts of all merges that ended, kept in Redis because many processes end them."""

from __future__ import annotations

from bisect import bisect_left

import redis

from service.broker import TALLY, text
from service.clock import millis
from service.documents import MergeRecord

BUCKETS = (1, 2, 5, 10, 30, 60, 300, 900, 3600)
"""Upper bounds of the histogram of the time that a merge ran, in seconds."""


def note(connection: redis.Redis, record: MergeRecord) -> None:
    """Count an ended merge: by method and state, by the code of its error, by its time."""
    method = str(record.recipe["merge_method"])
    with connection.pipeline() as pipe:
        pipe.hincrby(TALLY, f"ended|{method}|{record.state}", 1)
        if record.state == "failed" and record.error is not None:
            pipe.hincrby(TALLY, f"failed|{record.error.get('code', 'unknown')}", 1)
        if record.cached_from is not None:
            pipe.hincrby(TALLY, f"reused|{method}", 1)
        elif record.state == "succeeded" and record.started_at and record.finished_at:
            seconds = (millis(record.finished_at) - millis(record.started_at)) / 1000
            pipe.hincrby(TALLY, f"bucket|{method}|{bisect_left(BUCKETS, seconds)}", 1)
            pipe.hincrbyfloat(TALLY, f"seconds|{method}", seconds)
        pipe.execute()


def read(connection: redis.Redis) -> dict[tuple[str, ...], float]:
    """All counts, by the parts of their names, sorted."""
    found = connection.hgetall(TALLY)
    rows = ((tuple(text(name).split("|")), float(text(value))) for name, value in found.items())
    return dict(sorted(rows))
