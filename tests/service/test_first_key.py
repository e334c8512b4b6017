"""A service that needs a key, and has none yet, says how to make one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service import auth
from service.auth import FIRST_KEY, Keys
from service.storage import Storage
from tests.running import Up


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Up]:
    running = Up(tmp_path / "up", auth="keys")
    yield running
    running.stop()


def hint(running: Up) -> str:
    answer = httpx.get(f"{running.url}/v1/models", trust_env=False)
    assert answer.status_code == 401
    assert answer.json()["code"] == "key_missing"
    return str(answer.json()["remedy"])


def test_it_is_said_in_the_log_and_in_the_answer_until_there_is_one(locked: Up) -> None:
    assert FIRST_KEY in locked.log()
    assert hint(locked) == FIRST_KEY
    token, _ = Keys(Storage.open(locked.storage.as_uri())).create("acme", ["admin"])
    listed = httpx.get(
        f"{locked.url}/v1/models", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    )
    assert listed.status_code == 200
    locked.stop()
    (locked.data / "up.log").write_text("")
    locked.start()
    assert "Authorization" in hint(locked)
    assert FIRST_KEY not in locked.log()


def test_a_service_without_keys_says_nothing(up: Up) -> None:
    assert FIRST_KEY not in up.log()


def test_whether_there_is_one_is_not_asked_at_every_request(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(storage)
    assert not keys.exist()
    Keys(storage).create("acme", ["read"])  # by another process
    assert not keys.exist()
    monkeypatch.setattr(auth, "CACHE_SECONDS", 0.0)
    assert keys.exist()
    for path in (tmp_path / "storage" / "keys").iterdir():
        assert json.loads(path.read_text())["tenant"] == "acme"
        path.unlink()
    assert keys.exist()  # once is enough
