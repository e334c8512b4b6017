"""Token buckets: a burst, then a steady rate; never shared between tenants or classes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import redis
from redis.asyncio import Redis

from service import limits
from service.embedded_redis import EmbeddedRedis
from service.errors import TooOften
from service.limits import Limits


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000_000.0
        monkeypatch.setattr(limits.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run(server: EmbeddedRedis, act: Callable[[Limits], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Redis.from_url(server.url) as client:
            await act(Limits(client, read=60, write=6))

    asyncio.run(main())


async def taken(found: Limits, tenant: str, name: limits.RequestClass) -> int:
    """How many requests pass at once."""
    count = 0
    try:
        while count < 1000:
            await found.take(tenant, name)
            count += 1
    except TooOften:
        pass
    return count


def test_a_burst_then_a_steady_rate(
    redis_server: EmbeddedRedis, connection: redis.Redis, clock: Clock
) -> None:
    async def act(found: Limits) -> None:
        assert await taken(found, "a", "read") == 60
        clock.now += 10
        assert await taken(found, "a", "read") == 10
        clock.now += 3600
        assert await taken(found, "a", "read") == 60
        clock.now -= 3600  # a clock that is set back takes nothing and gives nothing
        assert await taken(found, "a", "read") == 0

    run(redis_server, act)


def test_tenants_and_classes_do_not_share(
    redis_server: EmbeddedRedis, connection: redis.Redis, clock: Clock
) -> None:
    async def act(found: Limits) -> None:
        assert await taken(found, "a", "write") == 6
        assert await taken(found, "b", "write") == 6
        assert await taken(found, "a", "read") == 60

    run(redis_server, act)


def test_the_headers_say_how_long_to_wait(
    redis_server: EmbeddedRedis, connection: redis.Redis, clock: Clock
) -> None:
    async def act(found: Limits) -> None:
        headers = await found.take("a", "write")
        assert headers == {"RateLimit-Policy": '"write";q=6;w=60', "RateLimit": '"write";r=5;t=10'}
        await taken(found, "a", "write")
        clock.now += 4
        with pytest.raises(TooOften) as raised:
            await found.take("a", "write")
        assert raised.value.headers["Retry-After"] == "6"
        clock.now += 6
        assert (await found.take("a", "write"))["RateLimit"] == '"write";r=0;t=60'

    run(redis_server, act)


def test_no_limit_is_no_header_and_no_count(redis_server: EmbeddedRedis, connection: redis.Redis) -> None:
    async def act(_: Limits) -> None:
        async with Redis.from_url(redis_server.url) as client:
            assert await Limits(client, read=0, write=0).take("a", "read") == {}

    run(redis_server, act)
    assert connection.keys("*") == []


def test_without_redis_nothing_is_limited() -> None:
    async def main() -> None:
        async with Redis.from_url("redis://127.0.0.1:1") as client:
            assert await Limits(client, read=1, write=1).take("a", "read") == {}

    asyncio.run(main())
