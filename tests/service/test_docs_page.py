"""The page at /docs: complete in itself, and allowed nothing from elsewhere."""

from __future__ import annotations

import re

import httpx
import pytest


def test_the_page_loads_only_what_the_service_has(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    wanted = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert "docs/swagger-ui-bundle.js" in wanted
    for address in wanted:
        if not address.startswith("data:"):
            assert http.get(f"/{address}").status_code == 200, address
    assert "<script>" not in page.text
    assert "//" not in page.text


@pytest.mark.parametrize(
    "path", ["/docs", "/docs/docs.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css"]
)
def test_its_policy_keeps_everything_foreign_out(http: httpx.Client, path: str) -> None:
    policy = dict(
        part.strip().split(" ", 1) for part in http.get(path).headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
