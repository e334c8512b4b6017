"""A service with keys: every route wants one, and shows each tenant its own things only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapters import write_adapter
from fastapi.routing import APIRoute

from service.app import create_app
from service.auth import Keys, Scope
from service.client import Client
from service.settings import Settings
from service.storage import Storage
from tests.running import Up, push

OPEN = {"/healthz", "/readyz", "/openapi.json", "/hf/api/validate-yaml"} | {
    f"/docs{file}" for file in ("", "/docs.js", "/swagger-ui-bundle.js", "/swagger-ui.css")
}


class Guarded:
    """`merganser up` with keys, and clients that have some."""

    def __init__(self, data: Path, **settings: str) -> None:
        self.up = Up(data, auth="keys", **settings)
        self.keys = Keys(Storage.open(self.up.storage.as_uri()))

    def token(self, tenant: str, *scopes: Scope) -> str:
        return self.keys.create(tenant, scopes or ("admin",))[0]

    def http(self, token: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.up.url, headers=headers, timeout=30, trust_env=False)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    running = Guarded(tmp_path_factory.mktemp("guarded"), webhook_allow="127.0.0.1")
    yield running
    assert running.up.stop() == 0, running.up.log()


@pytest.fixture(scope="module")
def things(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model, a merge and a key of the tenant `owner`, as values of path parameters."""
    folder = write_adapter(tmp_path_factory.mktemp("model") / "a", seed=1)
    with Client(guarded.up.url, key=guarded.token("owner")) as client:
        name = push(client, folder, "mine/a")
        merge = client.submit({"merge_method": "linear", "models": [{"model": name}]})
        assert client.wait(merge["id"])["state"] == "succeeded"
    announced = {"model": "mine/a", "path": "b.json", "size": 2, "sha256": "0" * 64}
    with guarded.http(guarded.token("owner")) as http:
        upload = http.post("/v1/uploads", json=announced).json()
        webhook = http.post("/v1/webhooks", json={"url": "http://127.0.0.1:9/"}).json()
        delivery = http.post(f"/v1/webhooks/{webhook['id']}/ping").json()
    return {
        "ns": "mine",
        "name": "a",
        "revision": name.partition("@")[2],
        "path": "adapter_config.json",
        "task": "a",
        "merge_id": merge["id"],
        "upload_id": upload["id"],
        "number": "1",
        "webhook_id": webhook["id"],
        "delivery_id": delivery["id"],
        "key_id": guarded.keys.create("owner", ["read"])[1].id,
    }


def operations() -> list[tuple[str, str]]:
    """Every method and path of the API."""
    app = create_app(Settings.model_construct())
    found: list[tuple[str, str]] = []

    def walk(routes: list[Any], prefix: str) -> None:
        for route in routes:
            if isinstance(route, APIRoute):
                found.extend((method, prefix + route.path) for method in sorted(route.methods))
            elif hasattr(route, "original_router"):
                walk(route.original_router.routes, prefix)

    walk(app.routes, "")
    return [item for item in found if item[1] not in OPEN]


def filled(path: str, things: dict[str, str]) -> str:
    for name, value in things.items():
        path = path.replace(f"{{{name}:path}}", value).replace(f"{{{name}}}", value)
    return path


OPERATIONS = operations()


def test_there_are_operations_to_try() -> None:
    assert len(OPERATIONS) > 20
    assert ("GET", "/v1/merges/{merge_id}") in OPERATIONS


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
@pytest.mark.parametrize("token", [None, "mk_0123456789abcdef_" + "A" * 43, "password"])
def test_nothing_without_a_key(
    guarded: Guarded, things: dict[str, str], method: str, path: str, token: str | None
) -> None:
    with guarded.http(token) as http:
        answer = http.request(method, filled(path, things))
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    if method != "HEAD":
        assert answer.json()["code"] == ("key_invalid" if token else "key_missing")


@pytest.mark.parametrize(
    ("method", "path"),
    [item for item in OPERATIONS if "_id}" in item[1] or "{name}" in item[1]],
)
def test_the_things_of_another_tenant_do_not_exist(
    guarded: Guarded, things: dict[str, str], method: str, path: str
) -> None:
    with guarded.http(guarded.token("stranger")) as http:
        if path == "/v1/methods/{name}":
            assert http.get("/v1/methods/ties").status_code == 200
            return
        if method == "PUT" and "upload_id" not in path:  # makes a thing of one's own under the same name
            assert http.put(filled(path, things), content=b"{}").status_code == 201
            return
        answer = http.request(method, filled(path, things))
    if path.endswith("/commit"):  # of one's own uploads, if any: there are no weights among them
        assert answer.json()["code"] in ("nothing_to_commit", "adapter_weights_missing")
        return
    assert answer.status_code == 404, answer.text


def test_a_signed_url_is_of_one_tenant_and_needs_no_key(guarded: Guarded, things: dict[str, str]) -> None:
    with guarded.http(guarded.token("owner")) as http:
        session = http.get(f"/v1/uploads/{things['upload_id']}").json()
    url = session["actions"]["upload"]["header"]["00001"]
    with guarded.http(None) as http:
        assert http.put(url, content=b"{}").status_code == 200
        for changed in (
            url.replace("tenant=owner", "tenant=stranger"),
            url.replace("signature=", "signature=0"),
        ):
            assert http.put(changed, content=b"{}").status_code in (403, 422)
        assert http.get(url.partition("/parts")[0] + "?" + url.partition("?")[2]).status_code == 401
    with guarded.http(guarded.token("owner", "read")) as http:
        assert http.put(url.partition("?")[0], content=b"{}").json()["code"] == "scope_missing"


def test_lists_hold_the_own_things_only(guarded: Guarded, things: dict[str, str]) -> None:
    with guarded.http(guarded.token("owner")) as http:
        assert [item["id"] for item in http.get("/v1/merges").json()["data"]] == [things["merge_id"]]
        assert [item["model"] for item in http.get("/v1/models").json()["data"]] == ["mine/a"]
    with guarded.http(guarded.token("empty")) as http:
        assert http.get("/v1/merges").json()["data"] == http.get("/v1/models").json()["data"] == []
        assert http.get("/v1/webhooks").json()["data"] == []
        assert len(http.get("/v1/keys").json()["data"]) == 1


def test_a_recipe_cannot_reach_across(guarded: Guarded, things: dict[str, str]) -> None:
    with guarded.http(guarded.token("stranger")) as http:
        for name in ("mine/a", f"mine/a@{things['revision']}", f"merges/{things['merge_id']}"):
            for path in ("/v1/merges", "/v1/merges/plan"):
                answer = http.post(path, json={"merge_method": "linear", "models": [{"model": name}]})
                assert answer.status_code == 422
                assert answer.json()["code"] in ("model_not_found", "revision_not_found")


def test_scopes(guarded: Guarded, things: dict[str, str]) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "mine/a"}]}
    with guarded.http(guarded.token("owner", "read")) as http:
        assert http.get("/v1/merges").status_code == 200
        assert http.post("/v1/merges/plan", json=recipe).status_code == 200
        for answer in (
            http.post("/v1/merges", json=recipe),
            http.put("/v1/models/mine/b/files/a.json", content=b"{}"),
            http.delete("/v1/models/mine/a"),
            http.get("/v1/keys"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")
    with guarded.http(guarded.token("owner", "write")) as http:
        assert http.put("/v1/models/mine/b/files/a.json", content=b"{}").status_code == 201
        assert http.post("/v1/keys", json={"scopes": ["read"]}).status_code == 403


def test_an_administrator_makes_and_revokes_keys(guarded: Guarded) -> None:
    with guarded.http(guarded.token("owner")) as http:
        made = http.post("/v1/keys", json={"scopes": ["read"], "name": "ci"})
        assert made.status_code == 201
        with guarded.http(made.json()["key"]) as other:
            assert other.get("/v1/merges").status_code == 200
            gone = http.delete(f"/v1/keys/{made.json()['id']}").json()
            assert gone["revoked_at"] is not None
            assert other.get("/v1/merges").status_code == 401
        listed = {row["id"]: row for row in http.get("/v1/keys").json()["data"]}
        assert listed[made.json()["id"]] == gone
        assert made.json()["key"].split("_", 2)[2] not in http.get("/v1/keys").text
        assert http.post("/v1/keys", json={"scopes": []}).status_code == 422
        assert http.post("/v1/keys", json={"scopes": ["root"]}).status_code == 422


def test_a_wiped_redis_locks_nobody_out(guarded: Guarded, things: dict[str, str]) -> None:
    token = guarded.token("owner")
    with guarded.up.redis() as redis:
        held = redis.keys("*")
    assert not any(b"mk_" in key or b"keys" in key for key in held)
    with guarded.http(token) as http:
        assert http.get(f"/v1/merges/{things['merge_id']}").status_code == 200


def test_with_keys_the_host_name_does_not_matter(guarded: Guarded) -> None:
    with guarded.http(guarded.token("owner")) as http:
        assert http.get("/v1/models", headers={"Host": "merge.example"}).status_code == 200
