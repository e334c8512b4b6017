"""`merganser reindex` and `merganser gc` beside a running service."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.cli import main
from tests.running import Up


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERGANSER_REDIS_URL", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_index_is_rebuilt_beside_the_service(
    up: Up, merged: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with up.redis() as redis:
        redis.delete("mg:local:merges", "mg:local:models")
    assert merged["id"] not in up.http.get("/v1/merges").text
    found = run(capsys, "reindex", "--data", str(up.data))
    assert found["found"]["succeeded"] >= 1
    assert found["found"]["models"] >= 2
    assert found["queued"] == []
    assert found["bytes"]["local"] > 0
    assert merged["id"] in up.http.get("/v1/merges").text
    assert "pair/a" in up.http.get("/v1/models").text


def test_what_is_referred_to_is_no_garbage(
    up: Up, merged: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    up.http.put("/v1/models/gc/m/files/a.json", content=b'{"lost": 1}')
    with up.redis() as redis:
        redis.delete("mg:local:staging:gc/m")
    told = run(capsys, "gc", "--data", str(up.data), "--grace", "0", "--dry-run")
    assert (told["dry_run"], told["objects"]["blobs"]) == (True, 1)
    done = run(capsys, "gc", "--data", str(up.data), "--grace", "0")
    assert done["objects"] == told["objects"]
    assert done["bytes"] == told["bytes"]
    assert run(capsys, "gc", "--data", str(up.data), "--grace", "0")["objects"] == {}
    for path in (f"/v1/merges/{merged['id']}/report", "/v1/models/pair/a/files/adapter_config.json"):
        assert up.http.get(path).status_code == 200


def test_people_read_it_too(up: Up, pair: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reindex", "--data", str(up.data)]) == 0
    told = capsys.readouterr()
    assert "models" in told.out
    assert "local stores" in told.err
    assert main(["gc", "--data", str(up.data)]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"


@pytest.mark.parametrize("command", ["reindex", "gc"])
def test_without_a_service_they_say_what_is_missing(
    command: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--data", str(tmp_path)]) == 2
    assert "[redis_missing]" in capsys.readouterr().err


def test_a_negative_grace_is_refused(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", "--data", str(tmp_path), "--grace", "-1"]) == 2
    assert "--grace" in capsys.readouterr().err
