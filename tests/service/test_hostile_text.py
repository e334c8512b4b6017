"""Text that JSON can hold and that nothing else can: answered with a problem, never with a 500."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import httpx
import pytest

LONE = "\ud800"
"""Half of a pair of UTF-16: JSON can hold it, UTF-8 cannot."""


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    """Send JSON as pure ASCII, as Python's json writes it, with Infinity and halves of pairs."""
    return http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def repo(up: Any) -> str:
    up.http.post("/hf/api/repos/create", json={"name": "text", "organization": "hostile"})
    return "hostile/text"


def commit(http: httpx.Client, repo: str, *lines: dict[str, Any]) -> httpx.Response:
    body = "".join(json.dumps(line) + "\n" for line in lines)
    return http.post(f"/hf/api/models/{repo}/commit/main", content=body)


BODIES: dict[str, tuple[str, Any]] = {
    "recipe, method": ("/v1/merges", {"merge_method": LONE, "models": [{"model": "a/b"}]}),
    "recipe, model": ("/v1/merges", {"merge_method": "linear", "models": [{"model": f"a/{LONE}"}]}),
    "recipe, hub": ("/v1/merges", {"merge_method": "linear", "models": [{"model": f"hf://a/{LONE}"}]}),
    "recipe, key": ("/v1/merges/plan", {"merge_method": "linear", LONE: 1, "models": [{"model": "a/b"}]}),
    "recipe, place": (
        "/v1/merges/plan",
        {"merge_method": "linear", "models": [{"model": f"hf://{LONE}/a/b"}]},
    ),
    "recipe, parameter": (
        "/v1/merges/plan",
        {"merge_method": "linear", "models": [{"model": "a/b"}], "parameters": {LONE: 1}},
    ),
    "upload, model": (
        "/v1/uploads",
        {"model": f"a/{LONE}", "path": "a.json", "size": 1, "sha256": "0" * 64},
    ),
    "upload, path": (
        "/v1/uploads",
        {"model": "a/b", "path": f"{LONE}.json", "size": 1, "sha256": "0" * 64},
    ),
    "webhook, url": ("/v1/webhooks", {"url": f"https://{LONE}.example/"}),
    "webhook, description": ("/v1/webhooks", {"url": "https://example.com/", "description": LONE}),
    "hub, name": ("/hf/api/repos/create", {"name": LONE}),
    "hub, organization": ("/hf/api/repos/create", {"name": "a", "organization": LONE}),
    "hub, kind": ("/hf/api/repos/create", {"name": "a", "type": LONE}),
    "hub, yaml": ("/hf/api/validate-yaml", {"content": f"---\na: {LONE}\n---\n", "repoType": "model"}),
    "hub, yaml tag": ("/hf/api/validate-yaml", {"content": f"---\na: !{LONE} [\n---\n"}),
}


@pytest.mark.parametrize("name", sorted(BODIES))
def test_half_a_pair_is_refused_or_taken_but_breaks_nothing(http: httpx.Client, name: str) -> None:
    path, body = BODIES[name]
    answer = post(http, path, body)
    assert answer.status_code < 500, (name, answer.text)


FILES: dict[str, dict[str, Any]] = {
    "half a pair": {"path": f"{LONE}.json", "size": 1},
    "half a pair, ignored": {"path": f".{LONE}", "size": 1},
    "endless": {"path": "a.json", "size": float("inf")},
    "no number": {"path": "a.json", "size": float("nan")},
    "negative": {"path": "a.json", "size": -1},
    "sample": {"path": "a.json", "size": 1, "sample": LONE},
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_advice_is_refused_for_such_files(http: httpx.Client, repo: str, name: str) -> None:
    answer = post(http, f"/hf/api/models/{repo}/preupload/main", {"files": [FILES[name]]})
    assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text)


LINES: dict[str, dict[str, Any]] = {
    "file": {"key": "file", "value": {"path": f"{LONE}.json", "content": "e30=", "encoding": "base64"}},
    "lfs": {"key": "lfsFile", "value": {"path": f"{LONE}.json", "algo": "sha256", "oid": "0" * 64}},
    "gone": {"key": "deletedFile", "value": {"path": f"{LONE}.json"}},
    "folder": {"key": "deletedFolder", "value": {"path": f"{LONE}"}},
    "key": {"key": LONE, "value": {"path": "a"}},
    "encoding": {"key": "file", "value": {"path": LONE, "content": "e30=", "encoding": LONE}},
    "oid": {"key": "lfsFile", "value": {"path": LONE, "oid": LONE}},
    "parent": {"key": "header", "value": {"summary": LONE, "parentCommit": LONE}},
    "line in a folder": {
        "key": "file",
        "value": {"path": "a\n/b.json", "content": "e30=", "encoding": "base64"},
    },
}


@pytest.mark.parametrize("name", sorted(LINES))
def test_such_commits_are_refused(http: httpx.Client, repo: str, name: str) -> None:
    answer = commit(http, repo, {"key": "header", "value": {"summary": ""}}, LINES[name])
    assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text)


@pytest.mark.parametrize("body", [{"name": "n\n"}, {"name": "n", "organization": "o\n"}], ids=["name", "ns"])
def test_a_name_does_not_end_with_a_line(http: httpx.Client, body: dict[str, str]) -> None:
    answer = post(http, "/hf/api/repos/create", body)
    assert (answer.status_code, answer.json()["code"]) == (422, "name_invalid"), answer.text


def test_an_announced_name_does_not_end_with_a_line(http: httpx.Client) -> None:
    answer = post(http, "/v1/uploads", {"model": "a/b\n", "path": "a.json", "size": 1, "sha256": "0" * 64})
    assert (answer.status_code, answer.json()["code"]) == (422, "name_invalid"), answer.text


def test_front_matter_that_would_grow_is_answered_at_once(http: httpx.Client) -> None:
    rows = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}"]
    rows += [
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 7)
    ]  # ten times ten times … a million keys, in 12 s
    content = "---\n" + "\n".join(rows) + "\n---\n"
    started = time.monotonic()
    answer = http.post("/hf/api/validate-yaml", json={"content": content})
    assert answer.status_code in (200, 400)
    assert time.monotonic() - started < 4.0


CURSORS = [[1, LONE], [10**400, "a"], [-(10**400), "a"], [1, "a\0b"], [1 << 70, "mrg_"]]


@pytest.mark.parametrize("place", ["/v1/merges", "/v1/models"])
@pytest.mark.parametrize("content", CURSORS, ids=["half a pair", "huge", "negative", "zero byte", "integer"])
def test_a_made_up_cursor_breaks_nothing(http: httpx.Client, place: str, content: list[Any]) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
    answer = http.get(place, params={"cursor": cursor})
    assert answer.status_code in (200, 400), answer.text


def test_an_event_id_beyond_what_redis_counts_is_refused(http: httpx.Client, merged: dict[str, Any]) -> None:
    for event in ("99999999999999999999-0", "0-99999999999999999999"):
        answer = http.get(merged["links"]["events"], headers={"Last-Event-ID": event})
        assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")
