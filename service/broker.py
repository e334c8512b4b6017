"""Connections to Redis and the names of its keys."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from merging.errors import InputError
from service.settings import Settings

TRANSIENT = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.BusyLoadingError)
"""What a restarting or unreachable server raises."""

PRIORITIES = ("high", "normal", "low")
SIZES = (4, 8, 16, 24, 48, 80)
"""Memory classes: a merge of a class runs on workers with at least so many GB of memory."""
NORMAL_QUEUE = "merges"


def queue_name(priority: str, size: int) -> str:
    """The work queue of a priority and a memory class."""
    name = NORMAL_QUEUE if size == SIZES[0] else f"{NORMAL_QUEUE}-{size}g"
    return name if priority == "normal" else f"{name}-{priority}"


QUEUES = tuple(queue_name(priority, size) for priority in PRIORITIES for size in reversed(SIZES))
"""The work queues, the first one served first: by priority, then what only large workers can do."""

TASK = "workers.tasks.run_merge"
"""The job function, named and never imported here."""
SHARD_TASK = "workers.shards.run_shard"
FINISH_TASK = "workers.shards.run_finish"
"""Those that make one file of a big merge, and complete it."""
PUSH_TASK = "workers.push.run_push"
"""The one that pushes a result to another hub."""


def connect(settings: Settings, *, patient: bool = False) -> redis.Redis:
    """A client. A ``patient`` one (workers) bridges an outage of some 15 s; others give up within 1 s."""
    attempts, cap = (20, 1.0) if patient else (4, 0.25)
    return redis.Redis.from_url(
        _url(settings),
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=cap), attempts),
        retry_on_error=list(TRANSIENT),
        socket_connect_timeout=5,
        socket_timeout=30,
        health_check_interval=30,
    )


def connect_async(settings: Settings) -> redis.asyncio.Redis:
    """A client for the event loop, for blocking reads of event streams."""
    return redis.asyncio.Redis.from_url(
        _url(settings),
        retry=AsyncRetry(ExponentialWithJitterBackoff(base=0.05, cap=0.25), 4),
        retry_on_error=list(TRANSIENT),
        socket_connect_timeout=5,
        socket_timeout=30,
        max_connections=4096,
    )


def text(value: Any) -> str:
    """An answer of the server as text."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _url(settings: Settings) -> str:
    if settings.redis_url is None:
        raise InputError(
            "redis_missing",
            "no Redis server is named",
            remedy="Set MERGANSER_REDIS_URL, or run `merganser up`, which brings its own",
            where={"field": "MERGANSER_REDIS_URL"},
        )
    return settings.redis_url


ACTIVE = "mg:active"
"""Set of ``tenant/merge`` of all merges that have not ended."""

UNSAVED = "mg:unsaved"
"""Set of ``tenant/merge`` of all merges that have ended but whose end is not in storage yet."""

ENTERING = "mg:entering"
"""Sorted set of ``tenant/merge`` by time (ms): merges that are being requested and not queued yet."""

DELETED = "mg:deleted"
"""Sorted set of ``tenant/merge`` by time (ms): merges that were deleted a moment ago."""

PUSHES = "mg:pushes"
"""Set of ``tenant/merge`` of all merges whose result is to be pushed to another hub, or is being pushed."""


def merge_key(tenant: str, merge_id: str) -> str:
    """Hash: the record of one merge."""
    return f"mg:{tenant}:merge:{merge_id}"


def shards_key(tenant: str, merge_id: str) -> str:
    """Hash: number of a shard -> how far it is, 0 to 1."""
    return f"mg:{tenant}:merge:{merge_id}:shards"


def merge_of_job(job_id: str) -> str:
    """The merge that a job works on; the jobs of shards are named after it."""
    return job_id.partition("--")[0]


def events_key(tenant: str, merge_id: str) -> str:
    """Stream: the events of one merge."""
    return f"mg:{tenant}:merge:{merge_id}:events"


def transition_keys(tenant: str, merge_id: str) -> list[str]:
    """What the scripts that change the state of a merge work on, in their order."""
    return [merge_key(tenant, merge_id), events_key(tenant, merge_id), ACTIVE, UNSAVED, merges_key(tenant)]


def merges_key(tenant: str, state: str | None = None) -> str:
    """Sorted set by time of creation: all merges, or those in one state."""
    return f"mg:{tenant}:merges:{state}" if state else f"mg:{tenant}:merges"


def models_key(tenant: str) -> str:
    """Sorted set by time of the last commit: the models' names."""
    return f"mg:{tenant}:models"


def revisions_key(tenant: str, model: str) -> str:
    """Sorted set by time of commit: the revisions of one model."""
    return f"mg:{tenant}:revisions:{model}"


def staging_key(tenant: str, model: str) -> str:
    """Hash: path -> digest and size of the files uploaded for the next revision."""
    return f"mg:{tenant}:staging:{model}"


def results_key(tenant: str) -> str:
    """Hash: digest of a job -> the merge that did it."""
    return f"mg:{tenant}:results"


def idempotency_key(tenant: str, digest: str) -> str:
    """String: what was asked for under an Idempotency-Key, and the merge that came of it."""
    return f"mg:{tenant}:idempotency:{digest}"


PACE = "mg:pace"
"""String: seconds from start to end of a merge, a moving average."""

TALLY = "mg:tally"
"""Hash: counts of ended merges."""
