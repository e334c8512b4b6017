"""How many bytes a tenant may store: reserved before they arrive, given back when they do not stay."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from service.errors import TooLarge

_STEP = 16 << 20
_RESERVE = """
local used = tonumber(redis.call('GET', KEYS[1]) or '0')
if used + tonumber(ARGV[1]) > tonumber(ARGV[2]) then return 0 end
redis.call('INCRBY', KEYS[1], ARGV[1])
return 1
"""


def usage_key(tenant: str) -> str:
    """Counter: bytes of a tenant's blobs, and what is reserved for uploads under way."""
    return f"mg:{tenant}:bytes"


class Quota:
    """The limit of every tenant."""

    def __init__(self, connection: Redis, limit: int) -> None:
        self._redis = connection
        self._limit = limit
        self._reserve = connection.register_script(_RESERVE)

    @asynccontextmanager
    async def grant(self, tenant: str, announced: int) -> AsyncIterator[Grant]:
        """Room for an upload of the announced length (0 if unknown). Raises ``quota_exceeded``."""
        grant = Grant(self, tenant)
        try:
            await grant.cover(announced)
            yield grant
        finally:
            await self._redis.decrby(usage_key(tenant), grant.reserved - grant.kept)

    async def reserve(self, tenant: str, size: int) -> bool:
        """Count bytes, if there is room for them."""
        return bool(await self._reserve(keys=[usage_key(tenant)], args=[size, self._limit]))


class Grant:
    """Room for one upload. What is not in ``kept`` at the end is given back."""

    def __init__(self, quota: Quota, tenant: str) -> None:
        self._quota = quota
        self._tenant = tenant
        self.reserved = 0
        self.kept = 0

    async def cover(self, size: int) -> None:
        """Make room for ``size`` bytes in all."""
        missing = size - self.reserved
        if missing <= 0:
            return
        for more in (max(missing, _STEP) if self.reserved else missing, missing):
            if await self._quota.reserve(self._tenant, more):
                self.reserved += more
                return
        raise TooLarge(
            "quota_exceeded",
            "the upload does not fit into what this tenant may store",
            remedy="Raise MERGANSER_MAX_TENANT_BYTES",
        )

    async def metered(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """The same chunks, none of them before there is room for it."""
        size = 0
        async for chunk in chunks:
            size += len(chunk)
            await self.cover(size)
            yield chunk
