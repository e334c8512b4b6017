"""Every error is a problem document (RFC 9457)."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

MEMBERS = {"type", "title", "status", "detail", "code", "errors", "instance"}


def check(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    problem: dict[str, Any] = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert set(problem) >= MEMBERS
    assert problem["type"] == f"urn:merganser:problem:{code}"
    assert problem["instance"] == answer.request.url.path
    return problem


def test_unknown_path(http: httpx.Client) -> None:
    check(http.get("/v1/nothing"), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/v1/merges", "GET, POST"),
        ("PATCH", "/v1/models/a/b/files/c.json", "GET, HEAD, PUT"),
        ("POST", "/v1/models/a/b", "DELETE, GET"),
        ("PUT", "/healthz", "GET"),
    ],
)
def test_wrong_method_names_all_that_are_possible(
    http: httpx.Client, method: str, path: str, allow: str
) -> None:
    answer = http.request(method, path)
    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allow


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b'{"a": 1}}', b"[" * 100_000])
def test_a_body_that_is_not_json(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/merges", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    check(answer, 400, answer.json()["code"])
    assert answer.json()["code"] in ("body_not_json", "bad_request")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", None])
@pytest.mark.parametrize("path", ["/v1/merges", "/v1/uploads"])
def test_json_that_is_not_marked_as_such(http: httpx.Client, path: str, kind: str | None) -> None:
    """What `curl -d` sends by itself, for instance."""
    headers = {} if kind is None else {"Content-Type": kind}
    problem = check(http.post(path, content=b'{"a": 1}', headers=headers), 415, "unsupported_media_type")
    assert "Content-Type: application/json" in problem["remedy"]


def test_no_body_where_one_is_needed(http: httpx.Client) -> None:
    check(http.post("/v1/merges"), 422, "request_invalid")


@pytest.mark.parametrize("body", ["[]", "7", '"text"', "null"])
def test_a_body_of_the_wrong_kind(http: httpx.Client, body: str) -> None:
    answer = http.post("/v1/merges", content=body, headers={"Content-Type": "application/json"})
    problem = check(answer, 422, "request_invalid")
    assert problem["errors"][0]["in"] == "body"


def test_a_number_that_json_does_not_know(http: httpx.Client) -> None:
    body = '{"merge_method": "linear", "models": [{"model": "a/b"}], "parameters": {"weight": NaN}}'
    answer = http.post("/v1/merges", content=body, headers={"Content-Type": "application/json"})
    check(answer, 422, "recipe_type")


@pytest.mark.parametrize("path", ["/v1/merges", "/v1/merges/plan"])
def test_a_body_that_is_too_large(http: httpx.Client, path: str) -> None:
    check(http.post(path, json={"name": "x" * (3 << 20)}), 413, "too_large")
    chunks = iter([b" " * (1 << 20)] * 3)  # without a length
    headers = {"Content-Type": "application/json"}
    check(http.post(path, content=chunks, headers=headers), 413, "too_large")


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "request_invalid"),
        ("limit=x", "request_invalid"),
        ("state=odd", "request_invalid"),
        ("cursor=xyz", "cursor_invalid"),
        ("cursor=W10", "cursor_invalid"),
        ("cursor=WyJhIiwxXQ", "cursor_invalid"),
    ],
)
def test_bad_queries(http: httpx.Client, query: str, code: str) -> None:
    answer = http.get(f"/v1/merges?{query}")
    problem = check(answer, 400 if code == "cursor_invalid" else 422, code)
    if code == "request_invalid":
        assert problem["errors"][0]["parameter"] == query.partition("=")[0]


def test_a_foreign_host_name_is_refused(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.json()["code"]) == (421, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost:1234", "127.0.0.1", "[::1]:80"])
def test_names_of_this_machine_are_fine(http: httpx.Client, host: str) -> None:
    assert http.get("/healthz", headers={"Host": host}).status_code == 200


def test_health_and_readiness(http: httpx.Client) -> None:
    assert http.get("/healthz").json()["status"] == "ok"
    assert http.get("/readyz").json() == {"status": "ready", "workers": 1}


def test_methods_are_the_catalogue(http: httpx.Client) -> None:
    from merging import catalog

    assert http.get("/v1/methods").json() == catalog.describe()
    assert http.get("/v1/methods/ties").json() == catalog.describe("ties")[0]
    problem = check(http.get("/v1/methods/tise"), 404, "unknown_method")
    assert "ties" in problem["remedy"]
