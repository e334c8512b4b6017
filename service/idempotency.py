"""Idempotency-Key: a request that is sent again, even at the same time, is done once.

The id of the merge is chosen before the work and kept under the key. Whether the work was done is then
seen from the merge itself, so a process that dies in between leaves no doubt.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from types import MappingProxyType
from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

from merging.errors import MergeError
from service.broker import TRANSIENT, idempotency_key, text
from service.errors import Conflict, ServiceError, Unavailable
from service.records import new_id

KEPT_SECONDS = 24 * 3600
_LEASE_SECONDS = 8.0
"""After such a silence whoever works on a request is taken for dead."""
_WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.03
_FREE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
_TAKE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return 1
"""


class InFlight(Conflict):
    """The first request with this key has not been answered yet."""

    headers = MappingProxyType({"Retry-After": "2"})


class Idempotency:
    """The keys of all tenants."""

    def __init__(self, connection: Redis) -> None:
        self._redis = connection
        self._free = connection.register_script(_FREE)
        self._take = connection.register_script(_TAKE)

    async def once(
        self,
        tenant: str,
        key: str,
        body: Any,
        work: Callable[[str], Awaitable[None]],
        done: Callable[[str], Awaitable[bool]],
    ) -> tuple[str, bool]:
        """The id of the merge that came of this key, and whether an earlier request had made it.

        ``work`` makes the merge with a given id, ``done`` tells whether there is one. When ``work`` refuses,
        the key is free again; when it breaks off, the next request goes on with the same merge.
        Raises ``idempotency_key_reused``, ``idempotency_in_flight``.
        """
        name = idempotency_key(tenant, hashlib.sha256(key.encode()).hexdigest())
        fingerprint = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            entry = json.dumps([fingerprint, new_id(), time.time()])
            if await self._redis.set(name, entry, nx=True, ex=KEPT_SECONDS):
                return await self._work(name, entry, work)
            held = await self._redis.get(name)
            if held is None:
                continue  # the one before us failed
            before, merge_id, since = json.loads(text(held))
            if before != fingerprint:
                raise ServiceError(
                    "idempotency_key_reused",
                    "this Idempotency-Key was used for another body",
                    remedy="Use a new key for a new merge",
                    where={"field": "Idempotency-Key"},
                )
            if await done(merge_id):
                return merge_id, True
            if time.time() - since > _LEASE_SECONDS:
                entry = json.dumps([fingerprint, merge_id, time.time()])
                if await self._take(keys=[name], args=[held, entry, KEPT_SECONDS]):
                    return await self._work(name, entry, work)
            if time.monotonic() > deadline:
                raise InFlight(
                    "idempotency_in_flight",
                    "the first request with this Idempotency-Key is still being worked on",
                    remedy="Send it again in a moment",
                )
            await asyncio.sleep(_POLL_SECONDS)

    async def _work(self, name: str, entry: str, work: Callable[[str], Awaitable[None]]) -> tuple[str, bool]:
        merge_id: str = json.loads(entry)[1]
        lease = _Lease(self._take, name, entry)
        renewal = asyncio.create_task(lease.renew())
        try:
            await work(merge_id)
        except BaseException as error:
            renewal.cancel()
            with contextlib.suppress(*TRANSIENT):
                if isinstance(error, MergeError) and not isinstance(error, Unavailable):
                    await self._free(keys=[name], args=[lease.entry])
                else:  # there may be a merge all the same, so the next one must go on with its id
                    await lease.date(0)
            raise
        finally:
            renewal.cancel()
        return merge_id, False


class _Lease:
    """The entry of a key that is worked on: dated again and again, so that others see that it is."""

    def __init__(self, take: AsyncScript, name: str, entry: str) -> None:
        self._take = take
        self._name = name
        self.entry = entry

    async def renew(self) -> None:
        """Keep the lease until this is cancelled."""
        while True:
            await asyncio.sleep(_LEASE_SECONDS / 4)
            with contextlib.suppress(*TRANSIENT):
                await self.date(time.time())

    async def date(self, moment: float) -> None:
        """Write another date into the entry, if it is ours still."""
        entry = json.dumps([*json.loads(self.entry)[:2], moment])
        if await self._take(keys=[self._name], args=[self.entry, entry, KEPT_SECONDS]):
            self.entry = entry
