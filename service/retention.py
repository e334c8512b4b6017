"""Delete merges some days after their end, with their results."""

from __future__ import annotations

import contextlib
import time

import redis

from merging.calibration.references import data_references
from service.broker import ACTIVE, merges_key, text
from service.clock import millis
from service.documents import FINAL
from service.errors import Conflict, NotFound
from service.jobs import Jobs
from service.names import RESULTS
from service.storage import Storage
from service.work import Configuration, Work, kept

_DAY_SECONDS = 24 * 3600


class Retention:
    """What is kept for ``days``. A result that a merge under way reads stays until that has ended."""

    def __init__(self, storage: Storage, connection: redis.Redis, days: float) -> None:
        self._storage = storage
        self._redis = connection
        self._jobs = Jobs(connection, storage)
        self._days = days

    def sweep(self) -> list[str]:
        """Delete what is too old; the ids of the deleted merges. Without days, nothing is."""
        if not self._days:
            return []
        before = round((time.time() - self._days * _DAY_SECONDS) * 1000)
        needed = self._needed()
        gone = []
        for tenant in self._storage.folders("merges"):
            for merge_id in self._older(tenant, before):
                if f"{tenant}/{merge_id}" in needed:
                    continue
                record = self._jobs.find(tenant, merge_id)
                if record is None or not record.finished_at or millis(record.finished_at) >= before:
                    continue
                with contextlib.suppress(NotFound, Conflict):  # someone was faster
                    self._jobs.delete(tenant, merge_id)
                    gone.append(merge_id)
        return gone

    def _older(self, tenant: str, before: int) -> list[str]:
        """Ended merges that were requested before a moment; no other can have ended before it."""
        return [
            text(item)
            for state in FINAL
            for item in self._redis.zrangebyscore(merges_key(tenant, state), "-inf", before)
        ]

    def _needed(self) -> set[str]:
        """``tenant/merge`` of the results that merges under way read."""
        found = set()
        for tenant, merge_id in self._jobs.members(ACTIVE):
            record = self._jobs.find(tenant, merge_id)
            for reference in _references(kept(record.recipe)) if record else ():
                ns, _, name = reference.partition("/")
                if ns == RESULTS:
                    found.add(f"{tenant}/{name}")
        return found


def _references(work: Work) -> list[str]:
    """All that a merge may read."""
    if isinstance(work, Configuration):
        return list(work.references().values())
    named = [entry.model for entry in work.models]
    return [*named, work.base_model or "", *data_references(work).values()]
