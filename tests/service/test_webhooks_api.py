"""Webhooks over HTTP: registered ones, that of a merge, and the log of what was delivered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapters import write_adapter

from service.webhooks.sign import new_secret
from tests.running import Up, push, until
from tests.service.receiver import Receiver, receiver

MISSING = "whk_" + "0" * 32


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A service that may send to loopback."""
    running = Up(tmp_path_factory.mktemp("hooked"), webhook_allow="127.0.0.1")
    yield running
    assert running.stop() == 0, running.log()


@pytest.fixture(scope="module")
def model(hooked: Up, tmp_path_factory: pytest.TempPathFactory) -> str:
    with hooked.client() as client:
        return push(client, write_adapter(tmp_path_factory.mktemp("a") / "a", seed=1), "hooks/a")


@pytest.fixture
def there() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


def deliveries(http: httpx.Client, webhook_id: str, state: str = "delivered") -> list[dict[str, Any]]:
    """The log of an endpoint, as soon as something in it has a state."""

    def found() -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = http.get(f"/v1/webhooks/{webhook_id}/deliveries").json()["data"]
        return data if any(item["state"] == state for item in data) else []

    listed: list[dict[str, Any]] = until(found, what=f"a delivery that is {state}")
    return listed


def recipe(model: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": model}], **more}


def test_a_registered_one_hears_of_every_merge(hooked: Up, model: str, there: Receiver) -> None:
    made = hooked.http.post("/v1/webhooks", json={"url": there.url, "description": "ci"})
    assert made.status_code == 201
    webhook = made.json()
    secret = webhook.pop("secret")
    assert secret.startswith("whsec_")
    assert hooked.http.get(f"/v1/webhooks/{webhook['id']}").json() == webhook
    assert webhook in hooked.http.get("/v1/webhooks").json()["data"]

    merge = hooked.http.post("/v1/merges", json=recipe(model), headers={"Prefer": "wait=30"}).json()
    assert merge["state"] == "succeeded"
    [delivery] = deliveries(hooked.http, webhook["id"])
    told = there.verified(secret)
    assert told["type"] == delivery["type"] == "merge.succeeded"
    assert told["data"]["id"] == merge["id"]
    assert told["data"]["result"]["files"] == merge["result"]["files"]

    again = hooked.http.post("/v1/merges", json=recipe(model)).json()  # the same job: it ends at once
    assert again["cached_from"] == merge["id"]
    until(lambda: len(there.received) == 2, what="the end of the second one")
    assert there.verified(secret)["data"]["id"] == again["id"]

    assert hooked.http.delete(f"/v1/webhooks/{webhook['id']}").status_code == 204
    assert hooked.http.get(f"/v1/webhooks/{webhook['id']}/deliveries").status_code == 404


@pytest.mark.parametrize("alone", [False, True], ids=["with a secret", "a URL alone"])
def test_a_merge_brings_its_own(hooked: Up, model: str, there: Receiver, alone: bool) -> None:
    if alone:
        secret, webhook = hooked.http.get("/v1/webhook-secret").json()["secret"], there.url
    else:
        secret = new_secret()
        webhook = {"url": there.url, "secret": secret, "events": ["merge.succeeded"]}
    body = recipe(model, webhook=webhook)
    merge = hooked.http.post("/v1/merges", json=body, headers={"Cache-Control": "no-cache"}).json()
    webhook_id = f"whk_{merge['id'].removeprefix('mrg_')}"
    [delivery] = deliveries(hooked.http, webhook_id)
    assert there.verified(secret)["data"]["id"] == merge["id"]
    assert hooked.http.get(f"/v1/webhooks/{webhook_id}").json()["merge"] == merge["id"]
    assert delivery["attempts"][0]["status"] == 204
    assert webhook_id not in [item["id"] for item in hooked.http.get("/v1/webhooks").json()["data"]]
    for path in (f"/v1/merges/{merge['id']}", f"/v1/webhooks/{webhook_id}", "/v1/merges"):
        assert secret not in hooked.http.get(path).text


def test_ping_and_retry(hooked: Up, there: Receiver) -> None:
    webhook = hooked.http.post("/v1/webhooks", json={"url": there.url}).json()
    here = f"/v1/webhooks/{webhook['id']}"
    sent = hooked.http.post(f"{here}/ping")
    assert (sent.status_code, sent.json()["type"]) == (202, "webhook.ping")
    deliveries(hooked.http, webhook["id"])
    again = hooked.http.post(f"{here}/deliveries/{sent.json()['id']}/retry")
    assert (again.status_code, again.json()["state"]) == (202, "pending")
    until(lambda: len(there.received) == 2, what="the message comes again")
    until(lambda: len(deliveries(hooked.http, webhook["id"])[0]["attempts"]) == 2, what="two attempts")
    assert {got["webhook-id"] for got, _ in there.received} == {sent.json()["id"]}
    hooked.http.delete(here)


def test_a_killed_service_delivers_when_it_is_back(hooked: Up, there: Receiver) -> None:
    """The receiver is away at first; the message outlives the service."""
    webhook = hooked.http.post("/v1/webhooks", json={"url": "http://127.0.0.1:9/"}).json()
    hooked.http.post(f"/v1/webhooks/{webhook['id']}/ping")
    deliveries(hooked.http, webhook["id"], "pending")
    until(
        lambda: deliveries(hooked.http, webhook["id"], "pending")[0]["attempts"],
        what="the first attempt failed",
    )
    hooked.process.kill()
    hooked.process.wait()
    document = hooked.storage / "webhooks" / "local" / f"{webhook['id']}.json"
    document.write_text(document.read_text().replace("http://127.0.0.1:9/", there.url))
    hooked.start()
    [delivery] = deliveries(hooked.http, webhook["id"])
    assert [attempt["status"] for attempt in delivery["attempts"]] == [None, 204]
    assert there.verified(webhook["secret"])["type"] == "webhook.ping"
    hooked.http.delete(f"/v1/webhooks/{webhook['id']}")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"url": "https://10.0.0.1/"}, "webhook_url_refused"),
        ({"url": "http://192.168.0.1:8080/"}, "webhook_url_refused"),
        ({"url": "ftp://example.com"}, "webhook_url_invalid"),
        ({"url": "https://example.com", "secret": "whsec_short"}, "webhook_secret_invalid"),
        ({"url": "https://example.com", "events": ["merge.imagined"]}, "request_invalid"),
        ({"url": "https://example.com", "events": []}, "request_invalid"),
        ({}, "request_invalid"),
    ],
)
def test_what_cannot_be_registered(hooked: Up, body: dict[str, Any], code: str) -> None:
    answer = hooked.http.post("/v1/webhooks", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_a_merge_with_a_bad_one_is_refused_before_anything_is_done(hooked: Up, model: str) -> None:
    before = len(hooked.http.get("/v1/merges?limit=200").json()["data"])
    answer = hooked.http.post("/v1/merges", json=recipe(model, webhook={"url": "https://169.254.169.254/"}))
    assert (answer.status_code, answer.json()["code"]) == (422, "webhook_url_refused")
    assert answer.json()["errors"][0]["pointer"] == "/webhook/url"
    answer = hooked.http.post(
        "/v1/merges", json=recipe(model, webhook={"url": "https://x.example", "nope": 1})
    )
    assert answer.status_code == 422
    assert len(hooked.http.get("/v1/merges?limit=200").json()["data"]) == before


def test_unknown(hooked: Up) -> None:
    for method, path in (
        ("GET", ""), ("DELETE", ""), ("POST", "/enable"), ("POST", "/ping"), ("GET", "/deliveries"),
        ("POST", f"/deliveries/msg_{'0' * 32}/retry"),
    ):  # fmt: skip
        answer = hooked.http.request(method, f"/v1/webhooks/{MISSING}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "webhook_not_found")


def test_secrets_are_not_in_the_log(hooked: Up, tmp_path: Path) -> None:
    assert "whsec_" not in hooked.log()
