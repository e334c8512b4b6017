"""Rebuild Redis from the storage: models, revisions, merges, results to reuse, what each tenant stores.

Idempotent, and safe beside a running service: what Redis knows is newer and stays. Merges that had not ended
are queued again, and so are pushes and messages of webhooks, whose attempts are counted anew. Lost for good
are uploads that were not committed, Idempotency-Keys, counts for metrics, the log of deliveries, and the
cancellation of a merge whose end was not in storage yet.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import redis

from service.broker import merges_key, models_key, results_key, revisions_key
from service.bulk import documents
from service.clock import millis, now
from service.documents import Manifest, MergeRecord, record_key
from service.jobs import Jobs
from service.pushes import Pushes
from service.quota import Reservations
from service.storage import Storage
from service.storage.blobs import BLOBS
from service.webhooks.deliveries import Deliveries
from service.webhooks.outbox import FOLDER as OUTBOX
from service.webhooks.outbox import Outbox

INDEXED = "mg:indexed"
"""String: when the index was last built. Not there: Redis is new, or has lost everything."""

_LOCK = "mg:reindexing"
_LOCK_SECONDS = 120
"""Renewed for each tenant. Two at once would do no harm either."""

_log = logging.getLogger("merganser.reindex")


@dataclass
class Reindexed:
    """What was found: numbers by kind, and the merges that were queued again."""

    found: Counter[str] = field(default_factory=Counter)
    queued: list[str] = field(default_factory=list)
    size: dict[str, int] = field(default_factory=dict)
    """Bytes that each tenant stores."""


class Reindexer:
    """Builds the index of all tenants."""

    def __init__(self, storage: Storage, connection: redis.Redis) -> None:
        self._storage = storage
        self._redis = connection
        self._jobs = Jobs(connection, storage)
        self._pushes = Pushes(connection, self._jobs)
        self._deliveries = Deliveries(connection)
        self._outbox = Outbox(storage)
        self._counters = Reservations(connection, 0)
        self._done = Reindexed()

    def needed(self) -> bool:
        """Whether there is no index."""
        return not self._redis.exists(INDEXED)

    def run(self) -> Reindexed | None:
        """Build the index; None when another process is building it."""
        if not self._redis.set(_LOCK, now(), nx=True, ex=_LOCK_SECONDS):
            return None
        try:
            folders = (BLOBS, "models", "merges", OUTBOX)
            names = {name for prefix in folders for name in self._storage.folders(prefix)}
            for tenant in sorted(names):
                self._redis.expire(_LOCK, _LOCK_SECONDS)
                self._models(tenant)
                results = self._merges(tenant)
                self._messages(tenant)
                blobs = sum(size for _, size in self._storage.keys(f"{BLOBS}/{tenant}"))
                self._done.size[tenant] = blobs + results
                self._counters.correct(tenant, blobs + results)
            self._redis.set(INDEXED, now())
        finally:
            self._redis.delete(_LOCK)
        _log.info("rebuilt the index: %s", dict(self._done.found))
        return self._done

    def _models(self, tenant: str) -> None:
        prefix = f"models/{tenant}"
        entered: list[tuple[str, str, str]] = []
        for key, document in documents(self._storage, (key for key, _ in self._storage.keys(prefix))):
            manifest = Manifest.model_validate(document)
            score = millis(manifest.created_at)
            with self._redis.pipeline() as pipe:
                pipe.zadd(revisions_key(tenant, manifest.model), {manifest.revision: score}, gt=True)
                pipe.zadd(models_key(tenant), {manifest.model: score}, gt=True)
                pipe.execute()
            entered.append((key, manifest.model, manifest.revision))
        there = {key for key, _ in self._storage.keys(prefix)}
        for key, model, revision in entered:
            if key not in there:  # deleted since it was read
                self._redis.zrem(revisions_key(tenant, model), revision)
                if not self._redis.exists(revisions_key(tenant, model)):
                    self._redis.zrem(models_key(tenant), model)
        self._done.found["revisions"] += len(entered)
        self._done.found["models"] += len({model for _, model, _ in entered})

    def _merges(self, tenant: str) -> int:
        """Enter the merges of a tenant; the bytes of their results."""
        stored = 0
        ended: list[str] = []
        records = (
            MergeRecord.model_validate(document)
            for _, document in documents(self._storage, self._storage.level(f"merges/{tenant}"))
        )
        for record in sorted(records, key=lambda record: (record.created_at, record.id)):
            self._done.found[record.state if record.ended else "unfinished"] += 1
            if record.ended:
                self._enter(record)
                if self._pushes.resume(record):
                    self._done.found["pushes"] += 1
                ended.append(record.id)
                stored += record.result.size if record.result else 0
            elif self._queue(record):
                self._done.queued.append(record.id)
        self._drop_deleted(tenant, ended)
        return stored

    def _messages(self, tenant: str) -> None:
        """Let messages be sent whose arrival nobody has noted."""
        for endpoint_id, message in self._outbox.every(tenant):
            if self._deliveries.add(tenant, endpoint_id, message):
                self._done.found["messages"] += 1

    def _enter(self, record: MergeRecord) -> None:
        score = millis(record.created_at)
        with self._redis.pipeline() as pipe:
            for state in (None, record.state):
                pipe.zadd(merges_key(record.tenant, state), {record.id: score})
            if record.state == "succeeded" and record.digest:
                pipe.hsetnx(results_key(record.tenant), record.digest, record.id)
            pipe.execute()

    def _queue(self, record: MergeRecord) -> bool:
        """Queue a merge again, unless Redis knows it or it has ended since it was read."""
        newest = self._storage.get_json(record_key(record.tenant, record.id))
        if newest is None or MergeRecord.model_validate(newest).ended:
            return False
        return self._jobs.enqueue(record)

    def _drop_deleted(self, tenant: str, ids: Iterable[str]) -> None:
        there = {
            key.rpartition("/")[2].removesuffix(".json") for key in self._storage.level(f"merges/{tenant}")
        }
        for merge_id in ids:
            if merge_id not in there:
                with self._redis.pipeline() as pipe:
                    for state in (None, "succeeded", "failed", "cancelled"):
                        pipe.zrem(merges_key(tenant, state), merge_id)
                    pipe.execute()
