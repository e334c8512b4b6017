"""A tenant's quota: kept before the bytes arrive, given back for what does not stay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.running import Up

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
