"""What an operator sees: metrics, request ids, logs, limits."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from service.exposition import Exposition
from tests.running import Up, until
from tests.service.conftest import Pair
from tests.service.test_tenants_api import Guarded

_SAMPLE = re.compile(r'^([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)*)\})? (-?[0-9.e+-]+|NaN)$')


def samples(text: str) -> dict[tuple[str, str], float]:
    """The values of a page, by name and labels; every line must have the form of Prometheus."""
    found: dict[tuple[str, str], float] = {}
    declared = ""
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            declared = line.split()[2]
        elif not line.startswith("#"):
            match = _SAMPLE.match(line)
            assert match, line
            assert match[1].startswith(declared), line
            assert (match[1], match[2] or "") not in found, line
            found[match[1], match[2] or ""] = float(match[3])
    return found


def test_metrics_tell_of_merges_and_requests(http: httpx.Client, merged: dict[str, Any]) -> None:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    assert found["merganser_workers", ""] == 1
    assert found["merganser_queue_depth", 'priority="normal",memory="4"'] >= 0
    assert found["merganser_merges_total", 'method="linear",state="succeeded"'] >= 1
    count = found["merganser_merge_seconds_count", 'method="linear"']
    assert count >= 1
    assert found["merganser_merge_seconds_bucket", 'method="linear",le="+Inf"'] == count
    label = 'method="GET",path="/v1/merges/{merge_id}",status="200"'
    assert found["merganser_http_requests_total", label] >= 1
    assert not any(merged["id"] in labels for _, labels in found)


def test_failures_and_reuse_are_counted(http: httpx.Client, pair: Pair, merged: dict[str, Any]) -> None:
    name = ("merganser_merges_reused_total", 'method="linear"')
    before = samples(http.get("/metrics").text).get(name, 0)
    http.post("/v1/merges", json=merged["recipe"])
    assert samples(http.get("/metrics").text)[name] == before + 1


def test_labels_are_escaped() -> None:
    page = Exposition()
    page.family("x", "counter", "X.")
    page.sample("x", 1.5, code='a"b\\c\nd')
    assert str(page) == '# HELP x X.\n# TYPE x counter\nx{code="a\\"b\\\\c\\nd"} 1.5\n'


@pytest.mark.parametrize("given", ["abc-123", "a" * 64])
def test_a_request_id_is_kept(http: httpx.Client, given: str) -> None:
    assert http.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "a" * 65, 'x"y'])
def test_an_odd_request_id_is_replaced(http: httpx.Client, given: str) -> None:
    found = http.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{16}", found)


def test_the_request_id_travels_into_the_job(up: Up, http: httpx.Client, pair: Pair) -> None:
    headers = {"X-Request-Id": "trace-7", "Prefer": "wait=60"}
    merge = http.post("/v1/merges", json=pair.recipe(), headers=headers).json()
    assert merge["state"] == "succeeded"

    def told() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in up.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("merge") == merge["id"]]

    lines = until(told, what="the worker logs the merge")
    assert {line["request_id"] for line in lines} == {"trace-7"}
    assert lines[0]["logger"] == "merganser.task"


def test_limits_are_announced_and_kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    guarded = Guarded(tmp_path_factory.mktemp("limited"), writes_per_minute="3")
    try:
        with guarded.http(guarded.token("a")) as http:
            answers = [http.post("/v1/models/x/y/commit") for _ in range(4)]
            assert [answer.status_code for answer in answers] == [409, 409, 409, 429]
            assert answers[0].headers["ratelimit-policy"] == '"write";q=3;w=60'
            assert answers[0].headers["ratelimit"].startswith('"write";r=2;')
            assert answers[3].json()["code"] == "rate_limited"
            assert 1 <= int(answers[3].headers["retry-after"]) <= 20
            assert http.get("/v1/models").status_code == 200
        with guarded.http(guarded.token("b")) as http:
            assert http.post("/v1/models/x/y/commit").status_code == 409
        with guarded.http(guarded.token("b", "write")) as http:
            assert http.get("/metrics").status_code == 403
    finally:
        assert guarded.up.stop() == 0
