"""Keys in storage: recognised, never readable, revoked for good."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from service import auth
from service.auth import Key, Keys, Principal
from service.cli import main
from service.errors import NotFound, ServiceError
from service.storage import Storage, StorageUnavailable


@pytest.fixture
def keys(storage: Storage) -> Keys:
    return Keys(storage)


def test_a_key_is_recognised_by_every_process(keys: Keys, storage: Storage) -> None:
    token, key = keys.create("acme", ["write"], name="laptop")
    assert token.startswith(f"mk_{key.id}_")
    expected = Principal("acme", ("write",), key.id)
    assert keys.identify(token) == Keys(storage).identify(token) == expected


def test_the_secret_is_nowhere(keys: Keys, tmp_path: Path) -> None:
    token, _ = keys.create("acme", ["read"])
    secret = token.split("_", 2)[2]
    stored = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert stored
    assert not any(secret in text for text in stored)


def wrong(token: str, other: str) -> Iterator[str]:
    yield token[:-1] + ("A" if token[-1] != "A" else "B")
    yield token + "A"
    yield token.replace("mk_", "mk_0", 1)
    yield "_".join((*token.split("_", 2)[:2], other.split("_", 2)[2]))
    yield "mk_" + "0" * 16 + "_" + "A" * 43
    yield "mk_../../../x_" + "A" * 43
    yield from ("", "mk_", "mk__", "é" * 40, token.upper())


def test_whatever_is_not_the_key_is_nobody(keys: Keys) -> None:
    token, _ = keys.create("acme", ["read"])
    other, _ = keys.create("acme", ["read"])
    for text in wrong(token, other):
        assert keys.identify(text) is None, text
    assert keys.identify(token) is not None


def test_a_revoked_key_is_refused_at_once_here_and_soon_elsewhere(
    keys: Keys, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, key = keys.create("acme", ["admin"])
    elsewhere = Keys(storage)
    assert elsewhere.identify(token) is not None
    revoked = keys.revoke(key.id)
    assert keys.identify(token) is None
    assert keys.revoke(key.id) == revoked
    monkeypatch.setattr(auth, "CACHE_SECONDS", 0.0)
    assert elsewhere.identify(token) is None


def test_what_is_known_spares_the_storage(
    keys: Keys, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, _ = keys.create("acme", ["read"])
    monkeypatch.setattr(storage, "get_json", None)
    assert keys.cached(token) == (True, keys.identify(token))
    assert Keys(storage).cached(token) == (False, None)


def test_a_key_of_another_tenant_cannot_be_revoked(keys: Keys) -> None:
    _, key = keys.create("acme", ["read"])
    with pytest.raises(NotFound):
        keys.revoke(key.id, tenant="other")
    with pytest.raises(NotFound):
        keys.revoke("../../merges/x")
    assert [found.id for found in keys.every("acme")] == [key.id]
    assert keys.every("other") == []


@pytest.mark.parametrize("tenant", ["", "A", "a/b", "..", "-a", "a-", "a:b", "a" * 64, "a b"])
def test_names_that_cannot_be_a_path_are_no_tenants(keys: Keys, tenant: str) -> None:
    with pytest.raises(ServiceError) as raised:
        keys.create(tenant, ["read"])
    assert raised.value.code == "tenant_invalid"


def test_scopes_include_the_lower_ones() -> None:
    table = {
        "read": (True, False, False),
        "write": (True, True, False),
        "admin": (True, True, True),
    }
    for held, expected in table.items():
        found = Principal("t", Key.model_validate({**BLANK, "scopes": (held,)}).scopes)
        assert tuple(found.may(scope) for scope in auth.SCOPES) == expected
    assert not Principal("t", ()).may("read")


BLANK = {"id": "0" * 16, "tenant": "t", "sha256": "", "created_at": ""}


def test_the_command_line_makes_lists_and_revokes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGANSER_DATA_DIR", str(tmp_path))
    assert main(["keys", "create", "--tenant", "acme", "--scope", "read", "--name", "ci"]) == 0
    shown = capsys.readouterr()
    token = shown.out.strip()
    assert token not in shown.err
    keys = Keys(Storage.open((tmp_path / "storage").as_uri()))
    found = keys.identify(token)
    assert found is not None
    assert (found.tenant, found.scopes) == ("acme", ("read",))

    assert main(["keys", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(row["id"], row["name"]) for row in listed] == [(found.key_id, "ci")]
    assert "sha256" not in listed[0]
    assert main(["keys", "list"]) == 0
    assert "acme" in capsys.readouterr().out

    assert main(["keys", "revoke", token]) == 0
    assert Keys(Storage.open((tmp_path / "storage").as_uri())).identify(token) is None
    assert main(["keys", "revoke", "0" * 16]) == 2
    assert "[key_not_found]" in capsys.readouterr().err
    assert main(["keys", "create", "--tenant", "No Such"]) == 2
    assert "[tenant_invalid]" in capsys.readouterr().err


def test_good_keys_work_while_the_storage_is_away(
    keys: Keys, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, _ = keys.create("acme", ["read"])
    unknown, _ = Keys(storage).create("acme", ["read"])
    asked: list[str] = []

    def away(key: str) -> None:
        asked.append(key)
        raise StorageUnavailable("storage_unavailable", "away")

    moment = time.monotonic() + 2 * auth.CACHE_SECONDS
    monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: moment))
    monkeypatch.setattr(storage, "get_json", away)
    for _ in range(3):
        assert keys.identify(token) is not None
    assert len(asked) == 1  # not each request waits for the storage
    with pytest.raises(StorageUnavailable):
        keys.identify(unknown)
    monkeypatch.setattr(auth, "OUTAGE_SECONDS", 0.0)
    with pytest.raises(StorageUnavailable):
        keys.identify(token)


def test_a_revoked_key_does_not_come_back_while_the_storage_is_away(
    keys: Keys, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, key = keys.create("acme", ["read"])
    keys.revoke(key.id)

    def away(key: str) -> None:
        raise StorageUnavailable("storage_unavailable", "away")

    monkeypatch.setattr(auth, "CACHE_SECONDS", 0.0)
    monkeypatch.setattr(storage, "get_json", away)
    with pytest.raises(StorageUnavailable):
        keys.identify(token)
    monkeypatch.setattr(auth, "CACHE_SECONDS", 5.0)
    assert keys.identify(token) is None
