"""A page of another origin, open in a browser on the machine, cannot use a service without keys."""

from __future__ import annotations

from contextlib import closing
from http.client import HTTPConnection

import httpx
import pytest


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1.evil.example", "x://["])
def test_a_page_of_another_origin_changes_nothing(http: httpx.Client, origin: str) -> None:
    # what a page can send without asking the service first: a POST of plain text
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    answer = http.post("/hf/api/repos/create", content='{"name": "planted"}', headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (403, "origin_not_allowed")
    assert http.get("/hf/api/models/local/planted").status_code == 404


@pytest.mark.parametrize("names", [[], ["127.0.0.1", "evil.example"], ["evil.example", "127.0.0.1"]])
def test_a_request_has_one_host(http: httpx.Client, names: list[str]) -> None:
    with closing(HTTPConnection(http.base_url.host, http.base_url.port or 80, timeout=10)) as connection:
        connection.putrequest("GET", "/v1/models", skip_host=True)
        for name in names:
            connection.putheader("Host", name)
        connection.endheaders()
        assert connection.getresponse().status == 421


def test_its_own_pages_can(http: httpx.Client) -> None:
    origin = str(http.base_url).rstrip("/")
    answer = http.post("/hf/api/validate-yaml", json={"content": ""}, headers={"Origin": origin})
    assert answer.status_code == 200
    assert http.get("/healthz", headers={"Origin": "http://localhost:3000"}).status_code == 200
