"""The storage is away for ten seconds, or Redis forgets everything: nothing is lost or published twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapters import write_adapter

from service.client import Client
from service.storage import Storage
from tests.running import Up, push, until
from tests.seaweed import Seaweed, in_bucket
from tests.workers.conftest import in_the_middle, submit_slow

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A server that these tests may stop."""
    server = Seaweed(tmp_path_factory.mktemp("outage"))
    yield server
    server.close()


@pytest.fixture
def up(server: Seaweed, start: Callable[..., Up]) -> Iterator[Up]:
    with in_bucket(server, server.url()):
        yield start()


def finished_once(client: Client, merge_id: str) -> dict[str, Any]:
    done = client.wait(merge_id)
    assert done["state"] == "succeeded", done
    events = [data["state"] for _, kind, data in client.events(merge_id) if kind == "state"]
    assert events.count("succeeded") == 1
    return done


@pytest.mark.parametrize(("how", "seconds"), [("killed", 10.0), ("frozen", 5.0)])
def test_a_merge_outlives_an_outage_of_the_storage(
    server: Seaweed, up: Up, large: list[Path], tmp_path: Path, how: str, seconds: float
) -> None:
    with up.client() as client:
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        stop, go_on = (server.kill, server.start) if how == "killed" else (server.freeze, server.thaw)
        stop()
        try:
            if how == "killed":
                refused = up.http.put("/v1/models/o/m/files/a.json", content=b"{}")
                assert (refused.status_code, refused.json()["code"]) == (503, "storage_unavailable")
            answers = during(up, seconds)
        finally:
            go_on()
        back = time.monotonic()
        done = finished_once(client, merge_id)
        assert time.monotonic() - back < 30
        assert done["attempts"] == 1  # the result was waiting for the storage, and is not computed again
        client.download_result(merge_id, tmp_path / "out")
        push(client, write_adapter(tmp_path / "a", seed=1), "o/m")
    assert set(answers) <= {200, 503}
    until(lambda: up.http.get("/readyz").status_code == 200, what="it is ready again")


def during(up: Up, seconds: float) -> list[int]:
    """The answers that the API gives meanwhile; each is either right or says when to come again."""
    deadline = time.monotonic() + seconds
    answers = []
    with httpx.Client(base_url=up.url, timeout=30, trust_env=False) as http:
        while (now := time.monotonic()) < deadline:
            assert http.get("/healthz").status_code == 200
            assert http.get("/v1/merges").status_code == 200  # Redis alone knows of those under way
            answer = http.get("/v1/models/slow/m0")
            answers.append(answer.status_code)
            if answer.status_code == 503:
                assert answer.json()["code"] == "storage_unavailable"
                assert int(answer.headers["Retry-After"]) > 0
            assert time.monotonic() - now < 25
            time.sleep(0.2)
    return answers


def test_a_wiped_redis_is_rebuilt_and_the_merge_runs_again(
    up: Up, server: Seaweed, large: list[Path], tmp_path: Path
) -> None:
    with up.client() as client:
        small = [push(client, write_adapter(tmp_path / str(i), seed=i), f"small/m{i}") for i in range(2)]
        recipe = {"merge_method": "linear", "models": [{"model": name} for name in small]}
        first = client.wait(client.submit(recipe)["id"])
        merge_id = submit_slow(client, large)
        in_the_middle(client, merge_id)
        waiting = client.submit({**recipe, "seed": 1})["id"]
        before = {path: up.http.get(path).json() for path in ("/v1/models", f"/v1/merges/{first['id']}")}
        with up.redis() as redis:
            redis.flushall()
        wiped = time.monotonic()
        until(lambda: listed(up, merge_id), what="the merges are listed again")
        until(lambda: client.merge(merge_id)["state"] == "running", what="it runs again")
        assert time.monotonic() - wiped < 15
        assert client.submit(recipe)["cached_from"] == first["id"]
        for unfinished in (merge_id, waiting):
            assert finished_once(client, unfinished)["attempts"] == 1
        for path, answer in before.items():
            assert up.http.get(path).json() == answer
        client.download_result(merge_id, tmp_path / "out")
    until(lambda: up.http.get("/readyz").json()["workers"] == 1, what="the worker is known", patience=60)
    attempts = storage(server, up).entries(f"merges/local/{merge_id}/attempts")
    assert len({entry.key.split("/")[4] for entry in attempts}) == 1


def listed(up: Up, merge_id: str) -> bool:
    return merge_id in [item["id"] for item in up.http.get("/v1/merges").json()["data"]]


def storage(server: Seaweed, up: Up) -> Storage:
    from service.settings import load_settings

    return Storage.open(load_settings().storage_location)
