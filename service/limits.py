"""How often a tenant may ask: a bucket of tokens for each class of requests, refilled steadily."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Literal

from redis.asyncio import Redis

from service.broker import TRANSIENT
from service.errors import TooOften

WINDOW_SECONDS = 60
RequestClass = Literal["read", "write"]

# KEYS: the bucket. ARGV: its size, tokens a second, now. Answers whether one was left, and what is left now.
_TAKE_ONE = """
local held = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local size, rate, now = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local tokens = tonumber(held[1] or size)
tokens = math.min(size, tokens + math.max(0, now - tonumber(held[2] or now)) * rate)
local taken = 0
if tokens >= 1 then taken, tokens = 1, tokens - 1 end
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', tostring(now))
redis.call('EXPIRE', KEYS[1], math.ceil(size / rate) + 1)
return {taken, tostring(tokens)}
"""
_log = logging.getLogger("merganser.limits")


@dataclass(frozen=True)
class Limit:
    """At most ``quota`` requests a minute; as many may come at once after a pause."""

    name: RequestClass
    quota: int


class Limits:
    """The buckets of all tenants. A quota of 0 is no limit."""

    def __init__(self, connection: Redis, *, read: int, write: int) -> None:
        self._take = connection.register_script(_TAKE_ONE)
        self._limits: dict[RequestClass, Limit] = {
            "read": Limit("read", read),
            "write": Limit("write", write),
        }

    async def take(self, tenant: str, name: RequestClass) -> dict[str, str]:
        """Count a request; headers that tell the client where it stands. Raises :class:`TooOften`.

        While Redis is away nothing is limited: everything that is worth it fails anyhow.
        """
        limit = self._limits[name]
        if limit.quota == 0:
            return {}
        rate = limit.quota / WINDOW_SECONDS
        try:
            taken, left = await self._take(
                keys=[f"mg:{tenant}:limit:{name}"], args=[limit.quota, rate, time.time()]
            )
        except TRANSIENT as error:
            _log.warning("requests are not counted: %s", error)
            return {}
        tokens = float(left)
        headers = {
            "RateLimit-Policy": f'"{name}";q={limit.quota};w={WINDOW_SECONDS}',
            "RateLimit": f'"{name}";r={int(tokens)};t={math.ceil((limit.quota - tokens) / rate)}',
        }
        if not taken:
            raise TooOften(name, limit.quota, max(1, math.ceil((1 - tokens) / rate)), headers)
        return headers
