"""Pages of a set that changes between them: nothing twice, nothing missed."""

from __future__ import annotations

import random

import pytest
import redis

from service.errors import BadRequest
from service.paging import page

KEY = "mg:test"


def fill(connection: redis.Redis, scores: dict[str, int]) -> None:
    connection.zadd(KEY, scores)


def rest(connection: redis.Redis, cursor: str | None, limit: int = 2) -> list[str]:
    found: list[str] = []
    while cursor is not None:
        members, cursor = page(connection, KEY, limit=limit, cursor=cursor)
        found += members
    return found


def test_a_member_that_leaves_takes_none_of_its_moment_along(connection: redis.Redis) -> None:
    fill(connection, dict.fromkeys("abcdef", 7) | {"z": 6})
    first, cursor = page(connection, KEY, limit=3, cursor=None)
    assert first == ["f", "e", "d"]
    connection.zrem(KEY, "d", "f")
    assert rest(connection, cursor) == ["c", "b", "a", "z"]


@pytest.mark.parametrize("seed", range(5))
def test_what_stays_comes_once(connection: redis.Redis, seed: int) -> None:
    chance = random.Random(seed)
    names = [f"m{i:02}" for i in range(60)]
    fill(connection, {name: chance.randrange(8) for name in names})
    gone: set[str] = set()
    found, cursor = page(connection, KEY, limit=7, cursor=None)
    step = 0
    while cursor is not None:
        leaving = chance.sample(names, 4)
        gone.update(leaving)
        connection.zrem(KEY, *leaving)
        fill(connection, {f"new{step}": 9})
        members, cursor = page(connection, KEY, limit=7, cursor=cursor)
        found += members
        step += 1
    assert len(found) == len(set(found))
    assert set(names) - gone <= set(found) <= set(names)


@pytest.mark.parametrize("cursor", ["", "!", "bm8", "WzEsMl0", "W10", "eyJhIjoxfQ"])
def test_a_foreign_cursor_is_refused(connection: redis.Redis, cursor: str) -> None:
    with pytest.raises(BadRequest):
        page(connection, KEY, limit=2, cursor=cursor)
