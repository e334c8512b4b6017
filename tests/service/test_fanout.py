"""Events for many listeners: each gets everything once and in order, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest
import redis
from redis.asyncio import Redis

from service import fanout
from service.broker import connect_async
from service.embedded_redis import EmbeddedRedis
from service.fanout import Fanout
from service.settings import Settings

END = "end"


def run(server: EmbeddedRedis, act: Callable[[Fanout, Redis, asyncio.Event], Awaitable[None]]) -> None:
    async def main() -> None:
        closing = asyncio.Event()
        async with connect_async(Settings(redis_url=server.url)) as client:
            await asyncio.wait_for(act(Fanout(client, closing), client, closing), 20)
            closing.set()

    asyncio.run(main())


async def add(client: Redis, key: str, *kinds: str) -> None:
    for kind in kinds:
        await client.xadd(key, {"event": kind, "data": kind})


async def listen(
    found: Fanout, key: str, after: str = "0-0", *, pause: float = 0.0, kinds: list[str] | None = None
) -> list[str]:
    """The kinds up to the end; ``kinds`` has those that came so far."""
    kinds = [] if kinds is None else kinds
    async with aclosing(found.follow(key, after)) as events:
        async for event in events:
            if event is not None:
                kinds.append(event.kind)
                await asyncio.sleep(pause)
                if event.kind == END:
                    break
    return kinds


def test_early_and_late_listeners_get_the_same(redis_server: EmbeddedRedis, connection: redis.Redis) -> None:
    names = [str(number) for number in range(40)]

    async def act(found: Fanout, client: Redis, closing: asyncio.Event) -> None:
        early = [asyncio.create_task(listen(found, "s")) for _ in range(10)]
        await add(client, "s", *names[:20])
        late = [asyncio.create_task(listen(found, "s")) for _ in range(10)]
        await add(client, "s", *names[20:], END)
        for told in await asyncio.gather(*early, *late):
            assert told == [*names, END]
        assert found.listening == 0

    run(redis_server, act)


def test_streams_are_not_mixed_up(redis_server: EmbeddedRedis, connection: redis.Redis) -> None:
    async def act(found: Fanout, client: Redis, closing: asyncio.Event) -> None:
        keys = [f"s{number}" for number in range(5)]
        tasks = [asyncio.create_task(listen(found, key)) for key in keys]
        for key in keys:
            await add(client, key, key, END)
        assert await asyncio.gather(*tasks) == [[key, END] for key in keys]

    run(redis_server, act)


def test_a_listener_starts_after_what_it_knows(redis_server: EmbeddedRedis, connection: redis.Redis) -> None:
    async def act(found: Fanout, client: Redis, closing: asyncio.Event) -> None:
        await add(client, "s", "a")
        known = await client.xadd("s", {"event": "b", "data": ""})
        everything = asyncio.create_task(listen(found, "s"))
        rest = asyncio.create_task(listen(found, "s", known.decode()))
        await add(client, "s", "c", END)
        assert await everything == ["a", "b", "c", END]
        assert await rest == ["c", END]

    run(redis_server, act)


def test_a_slow_listener_loses_nothing(
    redis_server: EmbeddedRedis, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "_BACKLOG", 3)
    names = [str(number) for number in range(100)]

    async def act(found: Fanout, client: Redis, closing: asyncio.Event) -> None:
        slow = asyncio.create_task(listen(found, "s", pause=0.005))
        quick = asyncio.create_task(listen(found, "s"))
        await add(client, "s", *names, END)
        assert await slow == await quick == [*names, END]

    run(redis_server, act)


def test_closing_ends_all_listeners(redis_server: EmbeddedRedis, connection: redis.Redis) -> None:
    async def act(found: Fanout, client: Redis, closing: asyncio.Event) -> None:
        told: list[list[str]] = [[] for _ in range(5)]
        tasks = [asyncio.create_task(listen(found, "s", kinds=kinds)) for kinds in told]
        await add(client, "s", "a")
        while told != [["a"]] * 5:
            await asyncio.sleep(0.01)
        closing.set()
        assert await asyncio.gather(*tasks) == [["a"]] * 5

    run(redis_server, act)


def test_the_reader_outlives_a_lost_connection(redis_server: EmbeddedRedis, connection: redis.Redis) -> None:
    async def act(found: Fanout, client: Redis, closing: asyncio.Event) -> None:
        kinds: list[str] = []
        task = asyncio.create_task(listen(found, "s", kinds=kinds))
        await add(client, "s", "a")
        killed = False
        while kinds != ["a"] or not killed:
            for row in connection.client_list():
                if kinds and row["cmd"] == "xread" and "b" in row["flags"]:  # it waits for more
                    killed = bool(connection.client_kill(row["addr"])) or killed
            await asyncio.sleep(0.01)
        await add(client, "s", "b", END)
        assert await task == ["a", "b", END]

    run(redis_server, act)
