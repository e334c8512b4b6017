"""What the API says when the storage has lost something."""

from __future__ import annotations

from typing import Any

from tests.running import Up


def test_lost_content_is_named(up: Up, merged: dict[str, Any]) -> None:
    (found,) = (up.storage / "merges" / "local" / merged["id"] / "attempts").rglob("merge.yaml")
    hidden = found.with_name("elsewhere")
    found.rename(hidden)
    try:
        answer = up.http.get(f"/v1/merges/{merged['id']}/files/merge.yaml")
    finally:
        hidden.rename(found)
    assert (answer.status_code, answer.json()["code"]) == (404, "content_missing")
    assert "merge.yaml" in answer.json()["detail"]
    assert up.http.get(f"/v1/merges/{merged['id']}/files/merge.yaml").status_code == 200
