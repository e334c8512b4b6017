"""How many bytes a tenant may store: reserved before they arrive, given back when they do not stay.

One counter holds what a tenant stores, blobs and results of merges, and what is reserved. A reservation has a
name. Those for a single request are leases, so that a process that is killed does not keep them for ever.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

import redis
from redis.asyncio import Redis

from service.errors import TooLarge
from service.storage import Storage

LEASE_SECONDS = 3600
"""A reservation for one request is renewed while bytes arrive; after such a silence it is taken for dead."""

_STEP = 16 << 20
# ARGV: name, bytes in all, limit, seconds of the lease (0: for good). Answers whether there is room.
_RESERVE = """
local now = tonumber(redis.call('TIME')[1])
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now)) do
  redis.call('DECRBY', KEYS[1], redis.call('HGET', KEYS[2], dead) or '0')
  redis.call('HDEL', KEYS[2], dead)
  redis.call('ZREM', KEYS[3], dead)
end
local more = tonumber(ARGV[2]) - tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
if more > 0 then
  if tonumber(redis.call('GET', KEYS[1]) or '0') + more > tonumber(ARGV[3]) then return 0 end
  redis.call('INCRBY', KEYS[1], string.format('%.0f', more))
  redis.call('HINCRBY', KEYS[2], ARGV[1], string.format('%.0f', more))
end
if ARGV[4] ~= '0' then redis.call('ZADD', KEYS[3], now + ARGV[4], ARGV[1]) end
return 1
"""
# ARGV: name, bytes that stay.
_SETTLE = """
local held = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('INCRBY', KEYS[1], string.format('%.0f', tonumber(ARGV[2]) - held))
"""
# ARGV: the counter as it was seen ('' if it was not there, '*' for whatever it is), bytes that are stored.
_CORRECT = """
if ARGV[1] ~= '*' and (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
local reserved = 0
for _, held in ipairs(redis.call('HVALS', KEYS[2])) do reserved = reserved + tonumber(held) end
redis.call('SET', KEYS[1], string.format('%.0f', reserved + tonumber(ARGV[2])))
return 1
"""


def usage_key(tenant: str) -> str:
    """Counter: bytes that a tenant stores, and what is reserved."""
    return f"mg:{tenant}:bytes"


def _keys(tenant: str) -> list[str]:
    """The counter; name -> bytes that are reserved; name -> end of the lease."""
    return [usage_key(tenant), f"mg:{tenant}:reserved", f"mg:{tenant}:leases"]


class Reservations:
    """Room that is kept over many requests, each by a name; given back once, however often that is asked."""

    def __init__(self, connection: redis.Redis, limit: int) -> None:
        self._redis = connection
        self._limit = limit
        self._reserve = connection.register_script(_RESERVE)
        self._settle = connection.register_script(_SETTLE)
        self._correct = connection.register_script(_CORRECT)

    def reserve(self, tenant: str, name: str, size: int, *, lease: bool = False) -> bool:
        """Count bytes under a name, if there is room; a name that holds some already keeps them.

        A ``lease`` ends by itself, some time after it was taken or renewed.
        """
        seconds = LEASE_SECONDS if lease else 0
        return bool(self._reserve(keys=_keys(tenant), args=[name, size, self._limit, seconds]))

    def reserve_result(self, tenant: str, merge_id: str, size: int) -> None:
        """Count the result of a merge that is about to be stored; again renews that.

        Raises ``quota_exceeded``.
        """
        if not self.reserve(tenant, merge_id, size, lease=True):
            raise _exceeded(f"the result, {size} bytes, does not fit into what this tenant may store")

    def settle(self, tenant: str, name: str, *, kept: int) -> None:
        """Give back what a name holds, but for the ``kept`` bytes that were stored."""
        self._settle(keys=_keys(tenant), args=[name, kept])

    def used(self, tenant: str) -> str:
        """The counter as it stands; empty when there is none."""
        found = self._redis.get(usage_key(tenant))
        return found.decode() if isinstance(found, bytes) else str(found or "")

    def correct(self, tenant: str, stored: int, *, seen: str = "*") -> bool:
        """Set the counter to what is stored, unless it is no longer as it was ``seen``."""
        return bool(self._correct(keys=_keys(tenant), args=[seen, stored]))

    def demand(self, tenant: str, size: int = 1) -> None:
        """Raise ``quota_exceeded`` if a tenant has no room for a result of so many bytes."""
        left = self._limit - int(self.used(tenant) or 0)
        if left <= 0:
            raise _exceeded("this tenant stores as much as it may already")
        if size > left:
            raise _exceeded(f"the result, up to {size} bytes, does not fit into what this tenant may store")


class Quota:
    """The limit of every tenant."""

    def __init__(self, connection: Redis, limit: int, storage: Storage | None = None) -> None:
        self._limit = limit
        self._storage = storage
        self._reserve = connection.register_script(_RESERVE)
        self._settle = connection.register_script(_SETTLE)

    @asynccontextmanager
    async def grant(self, tenant: str, announced: int) -> AsyncIterator[Grant]:
        """Room for an upload of the announced length (0 if unknown).

        Raises ``quota_exceeded`` and, when the disk would become too full, ``storage_full``.
        """
        grant = Grant(self, tenant)
        try:
            await grant.cover(announced)
            yield grant
        finally:
            await self._settle(keys=_keys(tenant), args=[grant.name, grant.kept])

    async def reserve(self, grant: Grant, size: int) -> bool:
        """Count bytes, if there is room for them."""
        if self._storage is not None:
            self._storage.demand_room(size - grant.reserved)
        args: list[str | int] = [grant.name, size, self._limit, LEASE_SECONDS]
        return bool(await self._reserve(keys=_keys(grant.tenant), args=args))


class Grant:
    """Room for one upload. What is not in ``kept`` at the end is given back."""

    def __init__(self, quota: Quota, tenant: str) -> None:
        self._quota = quota
        self.tenant = tenant
        self.name = uuid.uuid4().hex
        self.reserved = 0
        self.kept = 0

    async def cover(self, size: int) -> None:
        """Make room for ``size`` bytes in all."""
        if size <= self.reserved:
            return
        for total in (max(size, self.reserved + _STEP) if self.reserved else size, size):
            if await self._quota.reserve(self, total):
                self.reserved = total
                return
        raise _exceeded("the upload does not fit into what this tenant may store")

    async def metered(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """The same chunks, none of them before there is room for it; the lease is renewed on the way."""
        size = renewed = 0
        async for chunk in chunks:
            size += len(chunk)
            await self.cover(size)
            if size - renewed >= _STEP:
                renewed = size
                await self._quota.reserve(self, self.reserved)
            yield chunk


def _exceeded(message: str) -> TooLarge:
    return TooLarge(
        "quota_exceeded",
        message,
        remedy="Delete what is not needed, or raise MERGANSER_MAX_TENANT_BYTES",
    )
