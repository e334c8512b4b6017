"""Signed URLs: good for one thing, one tenant, a while."""

from __future__ import annotations

from urllib.parse import parse_qs

import pytest
import redis

from merging.errors import MergeError
from service.signing import SECRET_KEY, Signer

PATH = "/v1/uploads/upl_1/parts/1"


def signed(signer: Signer, *, seconds: int = 60) -> tuple[int, str]:
    query = parse_qs(signer.query("PUT", PATH, "acme", seconds=seconds))
    assert query["tenant"] == ["acme"]
    return int(query["expires"][0]), query["signature"][0]


def code(signer: Signer, method: str, path: str, tenant: str, expires: int, signature: str) -> str:
    with pytest.raises(MergeError) as raised:
        signer.check(method, path, tenant, expires, signature)
    return raised.value.code


def test_every_process_accepts_what_one_signed(connection: redis.Redis) -> None:
    expires, signature = signed(Signer(connection))
    Signer(connection).check("PUT", PATH, "acme", expires, signature)


def test_nothing_of_it_can_be_changed(connection: redis.Redis) -> None:
    signer = Signer(connection)
    expires, signature = signed(signer)
    for changed in (
        ("POST", PATH, "acme", expires, signature),
        ("PUT", PATH[:-1] + "2", "acme", expires, signature),
        ("PUT", PATH, "acme2", expires, signature),
        ("PUT", PATH, "acme", expires + 1, signature),
        ("PUT", PATH, "acme", expires, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        ("PUT", PATH, "acme", expires, ""),
        ("PUT", PATH, "acme", expires, "\N{SNOWMAN}"),
    ):
        assert code(signer, *changed) == "signature_invalid"


def test_fields_cannot_run_into_each_other(connection: redis.Redis) -> None:
    signer = Signer(connection)
    query = parse_qs(signer.query("PUT", "/a", "bc", seconds=60))
    expires, signature = int(query["expires"][0]), query["signature"][0]
    assert code(signer, "PUT", "/ab", "c", expires, signature) == "signature_invalid"


def test_it_ends(connection: redis.Redis) -> None:
    signer = Signer(connection)
    expires, signature = signed(signer, seconds=0)
    assert code(signer, "PUT", PATH, "acme", expires, signature) == "signature_expired"


def test_a_wiped_redis_ends_all_of_them_and_new_ones_are_good(connection: redis.Redis) -> None:
    signer = Signer(connection)
    old = signed(signer)
    connection.delete(SECRET_KEY)
    assert code(signer, "PUT", PATH, "acme", *old) == "signature_invalid"
    signer.check("PUT", PATH, "acme", *signed(signer))
