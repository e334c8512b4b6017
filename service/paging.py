"""Pages of a sorted set, newest first, by an opaque cursor."""

from __future__ import annotations

import base64
import json
from typing import Any, cast

import redis

from service.broker import text
from service.errors import BadRequest


def page(
    connection: redis.Redis, key: str, *, limit: int, cursor: str | None
) -> tuple[list[str], str | None]:
    """Up to ``limit`` members after ``cursor``, and the cursor of the next page or None.

    New members do not shift a page, nor do members that leave.
    """
    start = 0
    if cursor is not None:
        score, member = _decode(cursor)
        rank = connection.zrevrank(key, member)
        start = _before(connection, key, score, member) if rank is None else cast(int, rank) + 1
    found: Any = connection.zrevrange(key, start, start + limit, withscores=True)
    rows = [(text(member), int(score)) for member, score in found]
    more = rows[limit - 1] if len(rows) > limit else None
    return [member for member, _ in rows[:limit]], _encode(*more) if more else None


def _before(connection: redis.Redis, key: str, score: int, member: str) -> int:
    """How many members stand before a place where none is any more."""
    same: Any = connection.zrangebyscore(key, score, score)
    later = sum(1 for item in same if text(item) > member)
    return int(connection.zcount(key, f"({score}", "+inf")) + later


def _encode(member: str, score: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([score, member]).encode()).decode().rstrip("=")


def _decode(cursor: str) -> tuple[int, str]:
    try:
        data = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        score, member = data
        if type(score) is not int or type(member) is not str:
            raise ValueError("wrong types")
        member.encode()  # half a surrogate pair cannot be
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRequest(
            "cursor_invalid",
            "the cursor is not one of this service",
            remedy="Pass next_cursor of the page before, unchanged",
            where={"field": "cursor"},
        ) from error
    return score, member
