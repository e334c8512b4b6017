"""Requests for merges: sent again, held back, ranked, cancelled, repeated, deleted, answered from memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import Any

import httpx
import pytest
from adapters import write_adapter

from service.client import Client
from tests.running import Up, push, until
from tests.service.conftest import Pair

POST = "/v1/merges"


def key(name: str) -> dict[str, str]:
    return {"Idempotency-Key": name}


def test_fifty_requests_at_once_with_one_key_make_one_merge(up: Up, pair: Pair) -> None:
    body = pair.recipe()

    def send(_: int) -> httpx.Response:
        return httpx.post(f"{up.url}{POST}", json=body, headers=key("fifty"), timeout=60, trust_env=False)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(send, range(50)))
    assert {answer.status_code for answer in answers} <= {200, 202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    query = {"limit": 200, "state": "queued"}
    assert len(httpx.get(f"{up.url}{POST}", params=query, trust_env=False).json()["data"]) <= 1


def test_a_key_is_for_one_body(http: httpx.Client, pair: Pair) -> None:
    body = pair.recipe()
    first = http.post(POST, json=body, headers=key("one-body"))
    reordered = dict(reversed(body.items()))
    again = http.post(POST, json=reordered, headers=key("one-body"))
    assert (again.json()["id"], again.headers["idempotency-replayed"]) == (first.json()["id"], "true")
    other = http.post(POST, json={**body, "name": "x"}, headers=key("one-body"))
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert http.post(POST, json=body, headers=key("a b")).status_code == 422


def test_a_refused_request_leaves_its_key_free(http: httpx.Client, pair: Pair) -> None:
    bad = http.post(POST, json=pair.recipe(merge_method="no"), headers=key("free"))
    assert bad.status_code == 422
    good = http.post(POST, json=pair.recipe(), headers=key("free"))
    assert good.status_code == 202
    assert "idempotency-replayed" not in good.headers


def test_a_request_can_wait_for_the_end(http: httpx.Client, pair: Pair) -> None:
    answer = http.post(POST, json=pair.recipe(), headers={"Prefer": "respond-async, wait=30"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=30")
    assert answer.json()["state"] == "succeeded"


def test_the_same_job_is_not_done_again(http: httpx.Client, client: Client, pair: Pair) -> None:
    # A recipe of this test's own: others may have done the shared one again.
    merged = http.post(POST, json=pair.recipe(), headers={"Prefer": "wait=60"}).json()
    assert (merged["state"], merged["cached_from"]) == ("succeeded", None)
    recipe = merged["recipe"]
    swapped = {**recipe, "models": recipe["models"][::-1]}
    for body in (recipe, swapped, {**recipe, "name": "other"}):
        answer = http.post(POST, json=body)
        found = answer.json()
        assert (answer.status_code, found["state"], found["cached_from"]) == (200, "succeeded", merged["id"])
        assert found["id"] != merged["id"]
        assert found["result"]["files"] == merged["result"]["files"]
        assert [data["state"] for _, _, data in client.events(found["id"])] == ["succeeded"]
        assert http.get(f"{found['links']['files']}/report.json").status_code == 200
        assert http.get(f"{POST}/{found['id']}").json() == found
        assert found["id"] in [item["id"] for item in http.get(POST).json()["data"]]


def test_another_job_is_done(http: httpx.Client, merged: dict[str, Any]) -> None:
    recipe = merged["recipe"]
    changed = [
        {**recipe, "seed": recipe["seed"] + 100_000},
        {**recipe, "parameters": {"lambda": 0.5}},
        {**recipe, "models": recipe["models"][:1]},
    ]
    for body in changed:
        answer = http.post(POST, json=body, headers={"Prefer": "wait=60"}).json()
        assert (answer["state"], answer["cached_from"]) == ("succeeded", None)


def test_a_copied_result_outlives_the_first(http: httpx.Client, pair: Pair) -> None:
    body = pair.recipe()
    first = http.post(POST, json=body, headers={"Prefer": "wait=60"}).json()
    second = http.post(POST, json=body).json()
    assert second["cached_from"] == first["id"]
    assert http.delete(f"{POST}/{first['id']}").status_code == 204
    assert http.get(f"{POST}/{second['id']}/report").status_code == 200
    for path in ("", "/files", "/report", "/events"):
        assert http.get(f"{POST}/{first['id']}{path}").status_code == 404
    assert first["id"] not in [item["id"] for item in http.get(POST, params={"limit": 200}).json()["data"]]
    third = http.post(POST, json=body).json()
    assert third["cached_from"] in (first["id"], second["id"])
    assert third["state"] == "succeeded"


def test_filters(http: httpx.Client, pair: Pair) -> None:
    wanted = http.post(POST, json=pair.recipe(name="needle", merge_method="ties")).json()["id"]
    http.post(POST, json=pair.recipe(name="needle"))

    def ids(**query: Any) -> list[str]:
        return [item["id"] for item in http.get(POST, params={**query, "limit": 200}).json()["data"]]

    assert ids(name="needle", method="ties") == [wanted]
    assert len(ids(name="needle")) == 2
    assert ids(name="hay") == []


@pytest.fixture
def idle(up: Up, pair: Pair) -> Iterator[None]:
    """The worker of the service is stopped meanwhile."""

    def quiet() -> bool:
        with up.redis() as redis:
            return not redis.scard("mg:active")

    until(quiet, what="nothing is left to do")
    worker = up.pid_of("workers.process")
    os.kill(worker, signal.SIGSTOP)
    yield
    os.kill(worker, signal.SIGCONT)
    until(quiet, what="the queue is worked off")


def test_priorities_and_places_in_the_queue(idle: None, http: httpx.Client, pair: Pair, up: Up) -> None:
    ids = [
        http.post(POST, json=pair.recipe(priority=priority)).json()["id"]
        for priority in ("low", "normal", "normal", "high")
    ]
    places = [http.get(f"{POST}/{merge_id}").json()["queue_position"] for merge_id in ids]
    assert places == [3, 1, 2, 0]
    etas = [http.get(f"{POST}/{merge_id}").json()["eta_seconds"] for merge_id in ids]
    assert sorted(etas) == [etas[3], etas[1], etas[2], etas[0]]
    assert http.post(POST, json=pair.recipe(priority="urgent")).status_code == 422


def test_a_queued_merge_is_cancelled_at_once(idle: None, http: httpx.Client, pair: Pair, up: Up) -> None:
    merge_id = http.post(POST, json=pair.recipe()).json()["id"]
    early = http.delete(f"{POST}/{merge_id}")
    assert (early.status_code, early.json()["code"]) == (409, "merge_not_ended")
    answers = [http.post(f"{POST}/{merge_id}/cancel") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    found = answers[0].json()
    assert (found["state"], found["error"]["code"]) == ("cancelled", "cancelled")
    assert answers[1].json() == answers[2].json() == found
    with up.redis() as redis:
        assert redis.lrange("rq:queue:merges", 0, -1) == []
        assert not redis.exists(f"rq:job:{merge_id}")


def test_what_has_ended_cannot_be_cancelled_nor_repeated(http: httpx.Client, merged: dict[str, Any]) -> None:
    answer = http.post(f"{POST}/{merged['id']}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "merge_ended")
    answer = http.post(f"{POST}/{merged['id']}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "merge_not_failed")


def test_a_cancelled_merge_can_be_repeated(http: httpx.Client, pair: Pair, idle: None, up: Up) -> None:
    body = pair.recipe(name="again", priority="high")
    merge_id = http.post(POST, json=body).json()["id"]
    http.post(f"{POST}/{merge_id}/cancel")
    answer = http.post(f"{POST}/{merge_id}/retry")
    found = answer.json()
    assert (answer.status_code, found["state"], found["retry_of"]) == (202, "queued", merge_id)
    assert (found["name"], found["priority"]) == ("again", "high")
    assert answer.headers["location"] == f"{POST}/{found['id']}"


def test_the_outputs_of_tasks_have_addresses(client: Client, http: httpx.Client, tmp_path: Path) -> None:
    names = [
        push(client, write_adapter(tmp_path / str(seed), seed=seed), f"tasks/m{seed}") for seed in (1, 2)
    ]
    recipe = {"merge_method": "rmm", "models": [{"model": name} for name in names]}
    done = client.wait(client.submit(recipe)["id"])
    assert done["state"] == "succeeded", done["error"]
    path = next(
        file["path"] for file in done["result"]["files"] if file["path"].endswith("/adapter_config.json")
    )
    task, _, file = path.partition("/")
    answer = http.get(f"{POST}/{done['id']}/tasks/{task}/{file}")
    assert answer.status_code == 200
    assert answer.content == http.get(f"{POST}/{done['id']}/files/{path}").content
    assert http.get(f"{POST}/{done['id']}/tasks/none/{file}").status_code == 404


def test_streams_of_one_process_share_a_reader(up: Up, pair: Pair, http: httpx.Client, idle: None) -> None:
    """However many listen, one connection of the process waits for events."""
    merge_id = http.post(POST, json=pair.recipe()).json()["id"]
    listening = Semaphore(0)

    def follow(many: httpx.Client) -> str:
        with many.stream("GET", f"{POST}/{merge_id}/events") as answer:
            lines = []
            for line in answer.iter_lines():
                if not lines:
                    listening.release()
                lines.append(line)
        return "\n".join(lines)

    def waiting() -> int:
        with up.redis() as redis:
            return sum(found["cmd"] == "xread" and "b" in found["flags"] for found in redis.client_list())

    with (
        ThreadPoolExecutor(30) as pool,
        httpx.Client(base_url=up.url, trust_env=False, timeout=60) as many,
    ):
        told = [pool.submit(follow, many) for _ in range(30)]
        assert all(listening.acquire(timeout=30) for _ in told)
        seen = [(waiting(), time.sleep(0.02))[0] for _ in range(50)]
        assert max(seen) == 1
        http.post(f"{POST}/{merge_id}/cancel")
        texts = {future.result() for future in told}
    assert len(texts) == 1
    assert '"cancelled"' in texts.pop()
