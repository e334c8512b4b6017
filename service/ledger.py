"""Records of merges: in Redis while they live, in storage as they were submitted and as they ended.

Storage alone is all that is needed to rebuild Redis. What several steps make up is written down before the
first of them, so that whoever looks after the queues completes what a dead process began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import redis

from service import outlook, tally, transitions
from service.broker import (
    DELETED,
    ENTERING,
    PUSHES,
    UNSAVED,
    events_key,
    merge_key,
    merges_key,
    results_key,
    text,
)
from service.clock import millis, now
from service.documents import STATES, MergeRecord, MergeState, attempts_prefix, record_key
from service.errors import Conflict, NotFound
from service.paging import page
from service.quota import usage_key
from service.records import decode
from service.storage import Storage, StorageUnavailable
from service.webhooks.deliveries import announce
from service.webhooks.endpoints import Endpoints, of_merge

REMEMBERED_SECONDS = 120.0
"""So long it is known that a merge was deleted: no process takes longer over writing a record."""
_DELETIONS_AT_ONCE = 100
_PAGES_SEARCHED = 20


class Ledger:
    """The records of all tenants. Every method takes the tenant first."""

    def __init__(self, connection: redis.Redis, storage: Storage) -> None:
        self._redis = connection
        self._storage = storage
        self._settled = connection.register_script(transitions.SETTLED)

    def get(self, tenant: str, merge_id: str) -> MergeRecord:
        """The record of a merge. Raises ``merge_not_found``."""
        found = self.find(tenant, merge_id)
        if found is None:
            raise NotFound("merge_not_found", f"there is no merge {merge_id}")
        return found

    def find(self, tenant: str, merge_id: str) -> MergeRecord | None:
        """The record of a merge, from Redis or else from storage, or None."""
        fields = self._redis.hgetall(merge_key(tenant, merge_id))
        return decode(fields) if fields else self.stored(tenant, merge_id)

    def stored(self, tenant: str, merge_id: str) -> MergeRecord | None:
        """The record of a merge as the storage has it, or None."""
        data = self._storage.get_json(record_key(tenant, merge_id))
        return None if data is None else MergeRecord.model_validate(data)

    def entered(self, tenant: str, merge_id: str) -> bool:
        """Whether a merge exists as a whole: it is in Redis, or it has ended."""
        if self._redis.exists(merge_key(tenant, merge_id)):
            return True
        found = self.find(tenant, merge_id)
        return found is not None and found.ended

    def recent(
        self,
        tenant: str,
        *,
        limit: int,
        cursor: str | None,
        state: MergeState | None,
        matches: Callable[[MergeRecord], bool] = lambda record: True,
    ) -> tuple[list[MergeRecord], str | None]:
        """Merges, the newest first, and the cursor of the next page.

        With ``matches`` a page may be shorter than ``limit``; the cursor alone tells whether there is more.
        """
        key = merges_key(tenant, state)
        for _ in range(_PAGES_SEARCHED):
            ids, cursor = page(self._redis, key, limit=limit, cursor=cursor)
            records = [record for merge_id in ids if (record := self.find(tenant, merge_id))]
            found = [record for record in records if matches(record)]
            if found or cursor is None:
                break
        return found, cursor

    def members(self, key: str) -> list[tuple[str, str]]:
        """(tenant, merge) of the set of unfinished (``ACTIVE``) or of unsaved (``UNSAVED``) merges."""
        found = sorted(text(item) for item in self._redis.smembers(key))
        return [(tenant, merge_id) for tenant, _, merge_id in (item.partition("/") for item in found)]

    def known_result(self, tenant: str, digest: str) -> str | None:
        """The id of a merge that did the job with this digest, or None."""
        found = self._redis.hget(results_key(tenant), digest)
        return None if found is None else text(found)

    def make_known(self, record: MergeRecord | None) -> None:
        """Let the result be used again. At once: whoever saw the end may ask for the same the next moment."""
        if record is not None and record.digest:
            self._redis.hset(results_key(record.tenant), record.digest, record.id)

    # beginnings

    def note_entry(self, record: MergeRecord) -> None:
        """Say that a new record is about to be written to storage, and then into Redis."""
        self._redis.zadd(ENTERING, {f"{record.tenant}/{record.id}": millis(now())})

    def enter_ended(self, record: MergeRecord) -> None:
        """Enter a merge that has ended already into storage and into the lists. Safe to repeat."""
        member = f"{record.tenant}/{record.id}"
        self.note_entry(record)
        self.save(record)
        announce(self._redis, self._storage, record)
        with self._redis.pipeline() as pipe:
            pipe.zrem(ENTERING, member)
            for state in (None, record.state):
                pipe.zadd(merges_key(record.tenant, state), {record.id: millis(record.created_at)})
            if record.push_owed:
                pipe.sadd(PUSHES, member)
            first = pipe.execute()[0]
        if record.state == "succeeded":
            self.make_known(record)
        if first and record.result is not None:
            self._redis.incrby(usage_key(record.tenant), record.result.size)
        if first:
            tally.note(self._redis, record)

    # ends

    def save(self, record: MergeRecord) -> None:
        """Write a record to storage."""
        self._storage.put_json(record_key(record.tenant, record.id), record.model_dump(mode="json"))

    def save_end(self, record: MergeRecord) -> None:
        """Write a record that has ended, unless the merge is deleted meanwhile: it must not come back."""
        self.save(record)
        if self._redis.zscore(DELETED, f"{record.tenant}/{record.id}") is not None:
            self._storage.delete(record_key(record.tenant, record.id))

    def settle(self, tenant: str, merge_id: str) -> MergeRecord | None:
        """Write an ended record to storage; after that Redis may forget it. Safe to repeat.

        The end is told and counted the first time only.
        """
        key, member = merge_key(tenant, merge_id), f"{tenant}/{merge_id}"
        fields = self._redis.hgetall(key)
        record = decode(fields) if fields else None
        if record is None or not record.ended:
            self._redis.srem(UNSAVED, member)
            return record
        self.save_end(record)
        if b"counted" not in fields:
            announce(self._redis, self._storage, record)
        if record.push_owed:
            self._redis.sadd(PUSHES, member)
        if self._settled(keys=[key, UNSAVED], args=[member, fields.get(b"push", b"")]):
            self._conclude(record)
        return record

    def settle_if_possible(self, tenant: str, merge_id: str) -> None:
        """An end counts even while the storage is away; whoever supervises settles it later."""
        with contextlib.suppress(StorageUnavailable):
            self.settle(tenant, merge_id)

    def _conclude(self, record: MergeRecord) -> None:
        """Count an end; remember of a success the result of its job, its bytes, and the pace."""
        tally.note(self._redis, record)
        if record.state != "succeeded":
            return
        self.make_known(record)
        if record.result is not None:
            self._redis.incrby(usage_key(record.tenant), record.result.size)
        if record.started_at and record.finished_at:
            seconds = (millis(record.finished_at) - millis(record.started_at)) / 1000
            outlook.note(self._redis, seconds)

    # deletion

    def delete(self, tenant: str, merge_id: str) -> None:
        """Remove an ended merge and its result. Raises ``merge_not_ended``."""
        record = self.get(tenant, merge_id)
        if not record.ended:
            raise Conflict(
                "merge_not_ended", f"the merge {merge_id} is {record.state}", remedy="Cancel it first"
            )
        key, member = merge_key(tenant, merge_id), f"{tenant}/{merge_id}"
        self._redis.zadd(DELETED, {member: millis(now())})
        self._storage.delete(record_key(tenant, merge_id))
        with self._redis.pipeline() as pipe:
            pipe.hexists(key, "state")
            pipe.hexists(key, "counted")
            pipe.zrem(merges_key(tenant), merge_id)
            for state in STATES:
                pipe.zrem(merges_key(tenant, state), merge_id)
            for names in (UNSAVED, PUSHES):
                pipe.srem(names, member)
            pipe.delete(key, events_key(tenant, merge_id))
            live, counted, listed, *_ = pipe.execute()
        if record.result is not None and listed and (counted or not live):
            self._redis.decrby(usage_key(tenant), record.result.size)
        if record.digest and self.known_result(tenant, record.digest) == merge_id:
            self._redis.hdel(results_key(tenant), record.digest)
        self._erase(tenant, merge_id)

    def complete_deletions(self) -> None:
        """Delete once more what was deleted a while ago: its process may have died over it."""
        before = millis(now()) - REMEMBERED_SECONDS * 1000
        due = self._redis.zrangebyscore(DELETED, "-inf", before, start=0, num=_DELETIONS_AT_ONCE)
        for item in [text(found) for found in due]:
            tenant, _, merge_id = item.partition("/")
            self._erase(tenant, merge_id)
            self._redis.zrem(DELETED, item)

    def _erase(self, tenant: str, merge_id: str) -> None:
        self._storage.delete(record_key(tenant, merge_id))
        self._storage.delete_prefix(attempts_prefix(tenant, merge_id))
        Endpoints(self._storage).delete(tenant, of_merge(merge_id))
