"""A tenant's quota: kept before the bytes arrive, given back for what does not stay."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from adapters import write_adapter
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service import quota
from service.embedded_redis import EmbeddedRedis
from service.errors import TooLarge
from tests.running import Up, push

LIMIT = 1 << 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = Up(tmp_path_factory.mktemp("small"), max_tenant_bytes=str(LIMIT))
    yield up
    up.stop()


def used(up: Up) -> int:
    with up.redis() as redis:
        return int(redis.get("mg:local:bytes") or 0)


def put(http: httpx.Client, name: str, content: bytes | Iterator[bytes]) -> httpx.Response:
    return http.put(f"/v1/models/q/m/files/{name}", content=content)


def test_only_what_stays_counts(small: Up) -> None:
    before = used(small)
    assert put(small.http, "a.json", b"1" * 1000).status_code == 201
    assert used(small) == before + 1000
    assert put(small.http, "b.json", b"1" * 1000).status_code == 201  # the same content is stored once
    assert put(small.http, "c.json", b"PK\x03\x04" + b"x" * 1000).status_code == 422
    assert put(small.http, "d.json", iter([b"2" * 500, b"3" * 500])).status_code == 201
    assert used(small) == before + 2000


@pytest.mark.parametrize("announced", [True, False], ids=["with a length", "without a length"])
def test_what_does_not_fit_is_refused_and_leaves_nothing(small: Up, announced: bool) -> None:
    before = used(small)
    body = b"4" * LIMIT
    answer = put(small.http, "big.json", body if announced else iter([body[: LIMIT // 2]] * 2))
    assert (answer.status_code, answer.json()["code"]) == (413, "quota_exceeded")
    assert used(small) == before
    files = [path for path in Path(small.storage).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT // 2


def test_uploads_at_the_same_time_cannot_overshoot(small: Up) -> None:
    before = used(small)
    room = LIMIT - before
    size = room // 3

    def send(number: int) -> int:
        with httpx.Client(base_url=small.url, timeout=30, trust_env=False) as http:
            return put(http, f"p{number}.json", bytes([65 + number]) * size).status_code

    with ThreadPoolExecutor(8) as pool:
        answers = sorted(pool.map(send, range(8)))
    assert answers == [201] * 3 + [413] * 5
    assert used(small) == before + 3 * size


def test_a_tenant_without_room_cannot_ask_for_merges(small: Up) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "q/none"}]}
    assert small.http.post("/v1/merges", json=recipe).json()["code"] == "model_not_found"
    with small.redis() as redis:
        before = redis.getset("mg:local:bytes", LIMIT)
        asked = small.http.post("/v1/merges", json=recipe)
        again = small.http.post(f"/v1/merges/mrg_{'0' * 32}/retry")
        redis.set("mg:local:bytes", before)
    for answer in (asked, again):
        assert (answer.status_code, answer.json()["code"]) == (413, "quota_exceeded")


def test_a_merge_whose_result_does_not_fit_is_refused_at_once(small: Up, tmp_path: Path) -> None:
    with small.redis() as redis:
        redis.set("mg:local:bytes", 0)
        with small.client() as client:
            model = push(client, write_adapter(tmp_path / "a", seed=1), "q/adapter")
        redis.set("mg:local:bytes", LIMIT - 10)
        recipe = {"merge_method": "linear", "models": [{"model": model}]}
        answer = small.http.post("/v1/merges", json=recipe)
    assert (answer.status_code, answer.json()["code"]) == (413, "quota_exceeded")
    assert "the result, up to " in answer.json()["detail"]


def test_the_reservation_of_a_dead_process_ends(
    connection: Redis, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "LEASE_SECONDS", -1)

    async def run() -> tuple[bool, bool]:
        async with AsyncRedis.from_url(redis_server.url) as redis:
            limits = quota.Quota(redis, 100)
            first = await limits.reserve(quota.Grant(limits, "t"), 80)  # and then its process dies
            return first, await limits.reserve(quota.Grant(limits, "t"), 80)

    assert asyncio.run(run()) == (True, True)
    assert connection.get("mg:t:bytes") == b"80"


def test_a_named_reservation_is_given_back_once(connection: Redis) -> None:
    room = quota.Reservations(connection, 100)
    assert room.reserve("t", "a", 60)
    assert room.reserve("t", "a", 60)
    assert not room.reserve("t", "b", 60)
    room.settle("t", "a", kept=10)
    room.settle("t", "a", kept=0)
    assert room.used("t") == "10"
    assert room.reserve("t", "b", 90)
    with pytest.raises(TooLarge) as raised:
        room.demand("t")
    assert raised.value.code == "quota_exceeded"


def test_the_counter_is_corrected_only_as_it_was_seen(connection: Redis) -> None:
    room = quota.Reservations(connection, 100)
    room.reserve("t", "a", 5)
    seen = room.used("t")
    connection.incrby("mg:t:bytes", 7)
    assert not room.correct("t", 50, seen=seen)
    assert room.used("t") == "12"
    assert room.correct("t", 50, seen="12")
    assert room.used("t") == "55"  # with what is reserved
    room.settle("t", "a", kept=0)
    assert room.used("t") == "50"


def test_the_disk_is_not_filled(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("full")
    free = shutil.disk_usage(folder).free
    up = Up(folder, min_free_bytes=str(free + (1 << 40)))
    try:
        for body in (b"1" * 1000, iter([b"1" * 1000])):
            answer = put(up.http, "a.json", body)
            assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
        assert used(up) == 0
    finally:
        up.stop()
