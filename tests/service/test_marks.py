"""The agreement between the collector and whoever refers to content."""

from __future__ import annotations

import pytest
import redis

from service import marks
from service.marks import Marks

A, B = "a" * 64, "b" * 64


@pytest.fixture
def both(connection: redis.Redis) -> Marks:
    return Marks(connection)


def test_what_is_marked_can_be_removed(both: Marks) -> None:
    both.mark("t", [A])
    assert both.condemn("t", [A, B]) == [A]


def test_what_was_spared_meanwhile_cannot(both: Marks) -> None:
    both.mark("t", [A, B])
    assert both.spare("t", [A]) == []
    assert both.condemn("t", [A, B]) == [B]


def test_who_comes_too_late_learns_it_until_the_removal_is_over(both: Marks) -> None:
    both.mark("t", [A])
    both.condemn("t", [A])
    assert both.spare("t", [A, B]) == [A]
    assert both.condemn("t", [A]) == []
    both.forget("t", [A])
    assert both.spare("t", [A]) == []


def test_a_removal_that_was_broken_off_blocks_nobody_for_ever(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Marks(connection)
    both.mark("t", [A, B])
    both.condemn("t", [A, B])
    long_ago = int(connection.time()[0]) - marks.REMOVING_SECONDS - 1
    connection.hset("mg:t:marks", mapping={A: long_ago, B: long_ago})
    assert both.spare("t", [A]) == []
    assert both.condemn("t", [A, B]) == [B]


def test_tenants_have_marks_of_their_own(both: Marks) -> None:
    both.mark("t", [A])
    assert both.condemn("other", [A]) == []
