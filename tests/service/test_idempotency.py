"""One key, one merge: also when the first request fails, dies, or takes too long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
import redis
from redis.asyncio import Redis

from service import idempotency
from service.embedded_redis import EmbeddedRedis
from service.errors import ServiceError
from service.idempotency import Idempotency, InFlight
from service.storage import StorageUnavailable


class Died(BaseException):
    """Stands for the end of the process."""


class Merges:
    """What was made."""

    def __init__(self) -> None:
        self.made: list[str] = []

    async def work(self, merge_id: str) -> None:
        await asyncio.sleep(0.01)
        self.made.append(merge_id)

    async def done(self, merge_id: str) -> bool:
        return merge_id in self.made


def run(server: EmbeddedRedis, act: Callable[[Idempotency, Merges], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Redis.from_url(server.url) as client:
            await asyncio.wait_for(act(Idempotency(client), Merges()), 20)

    asyncio.run(main())


def test_tenants_do_not_share_keys(redis_server: EmbeddedRedis, connection: redis.Redis) -> None:
    async def act(keys: Idempotency, merges: Merges) -> None:
        first = await keys.once("a", "k", {"x": 1}, merges.work, merges.done)
        second = await keys.once("b", "k", {"x": 2}, merges.work, merges.done)
        assert merges.made == [first[0], second[0]]
        assert await keys.once("a", "k", {"x": 1}, merges.work, merges.done) == (first[0], True)

    run(redis_server, act)


def test_the_second_goes_on_when_the_first_fails(
    redis_server: EmbeddedRedis, connection: redis.Redis
) -> None:
    async def act(keys: Idempotency, merges: Merges) -> None:
        started, asked = asyncio.Event(), asyncio.Event()

        async def fail(_: str) -> None:
            started.set()
            await asked.wait()
            raise ServiceError("no", "no")

        async def done(merge_id: str) -> bool:
            asked.set()  # by the second, which has to wait
            return await merges.done(merge_id)

        first = asyncio.create_task(keys.once("a", "k", {}, fail, merges.done))
        await started.wait()
        second = asyncio.create_task(keys.once("a", "k", {}, merges.work, done))
        with pytest.raises(ServiceError):
            await first
        merge_id, replayed = await second
        assert (merges.made, replayed) == ([merge_id], False)

    run(redis_server, act)


def test_while_the_first_takes_long_the_second_is_told_so(
    redis_server: EmbeddedRedis, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "_WAIT_SECONDS", 0.1)

    async def act(keys: Idempotency, merges: Merges) -> None:
        started = asyncio.Event()

        async def hang(_: str) -> None:
            started.set()
            await asyncio.Event().wait()

        first = asyncio.create_task(keys.once("a", "k", {}, hang, merges.done))
        await started.wait()
        with pytest.raises(InFlight) as raised:
            await keys.once("a", "k", {}, merges.work, merges.done)
        assert raised.value.status == 409
        assert raised.value.headers["Retry-After"] == "2"
        first.cancel()

    run(redis_server, act)


def test_a_process_that_died_before_or_after_the_work_leaves_one_merge(
    redis_server: EmbeddedRedis, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "_LEASE_SECONDS", 0.1)

    async def act(keys: Idempotency, merges: Merges) -> None:
        async def nothing(**_: object) -> int:  # a dead process frees nothing and says nothing
            return 0

        dead = Idempotency(keys._redis)
        dead._free = dead._take = nothing  # type: ignore[assignment]

        async def die_before(_: str) -> None:
            raise Died

        async def die_after(merge_id: str) -> None:
            merges.made.append(merge_id)
            raise Died

        for name, work in (("before", die_before), ("after", die_after)):
            merges.made.clear()
            with contextlib.suppress(Died):
                await dead.once("a", name, {}, work, merges.done)
            tries = [keys.once("a", name, {}, merges.work, merges.done) for _ in range(5)]
            found = await asyncio.gather(*tries)
            assert len(merges.made) == 1
            assert {merge_id for merge_id, _ in found} == set(merges.made)

    run(redis_server, act)


def test_after_an_outage_or_an_abort_the_next_request_goes_on_with_the_same_merge(
    redis_server: EmbeddedRedis, connection: redis.Redis
) -> None:
    """The first one may have made its merge all the same, so a second id would make two of one."""

    async def act(keys: Idempotency, merges: Merges) -> None:
        for error in (redis.ConnectionError(), StorageUnavailable("x", "x"), asyncio.CancelledError()):
            tried: list[str] = []

            async def fail(merge_id: str, error: BaseException = error, tried: list[str] = tried) -> None:
                tried.append(merge_id)
                raise error

            with pytest.raises(type(error)):
                await keys.once("a", repr(error), {}, fail, merges.done)
            assert await keys.once("a", repr(error), {}, merges.work, merges.done) == (tried[0], False)
            assert await keys.once("a", repr(error), {}, fail, merges.done) == (tried[0], True)

    run(redis_server, act)


def test_one_that_takes_long_is_not_taken_for_dead(
    redis_server: EmbeddedRedis, connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "_LEASE_SECONDS", 1.0)

    async def act(keys: Idempotency, merges: Merges) -> None:
        async def slow(merge_id: str) -> None:
            await asyncio.sleep(2.5)
            await merges.work(merge_id)

        tries = [keys.once("a", "k", {}, slow, merges.done) for _ in range(3)]
        found = await asyncio.gather(*tries)
        assert sorted(replayed for _, replayed in found) == [False, True, True]
        assert len(merges.made) == 1

    run(redis_server, act)
