"""The Hub's protocol, header by header."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
from formats.image_files import kohya_layers, write_kohya

from tests.service.conftest import Pair


def at(merged: dict[str, Any], path: str) -> str:
    return f"/hf/merges/{merged['id']}/resolve/main/{path}"


def test_head_tells_what_get_sends(http: httpx.Client, merged: dict[str, Any]) -> None:
    path = at(merged, "adapter_model.safetensors")
    head, got = http.head(path), http.get(path)
    assert head.content == b""
    for answer in (head, got):
        assert answer.status_code == 200
        assert len(answer.headers["x-repo-commit"]) == 40
        assert answer.headers["etag"] == f'"{hashlib.sha256(got.content).hexdigest()}"'
        assert int(answer.headers["content-length"]) == len(got.content)
        assert answer.headers["accept-ranges"] == "bytes"
        assert "content-encoding" not in answer.headers
        assert not [name for name in answer.headers if "xet" in name]


def test_a_range_is_a_part(http: httpx.Client, merged: dict[str, Any]) -> None:
    path = at(merged, "adapter_model.safetensors")
    whole = http.get(path)
    part = http.get(path, headers={"Range": "bytes=8-99"})
    assert part.status_code == 206
    assert part.content == whole.content[8:100]
    assert part.headers["x-repo-commit"] == whole.headers["x-repo-commit"]
    assert http.get(path, headers={"Range": "bytes=99999999-"}).status_code == 416


def test_what_is_missing_is_named(http: httpx.Client, pair: Pair, merged: dict[str, Any]) -> None:
    commit = http.get(f"/hf/api/models/merges/{merged['id']}").json()["sha"]
    entry = http.head(at(merged, "no.json"))
    assert (entry.status_code, entry.headers["x-error-code"]) == (404, "EntryNotFound")
    assert entry.headers["x-repo-commit"] == commit
    for path, code in {
        "/hf/api/models/no/such": "RepoNotFound",
        "/hf/api/models/..%5c/such": "RepoNotFound",
        "/hf/api/models/merges/none": "RepoNotFound",
        f"/hf/api/models/merges/mrg_{'0' * 32}": "RepoNotFound",
        "/hf/api/models/pair/a/revision/v2": "RevisionNotFound",
        f"/hf/pair/a/resolve/{'0' * 40}/adapter_config.json": "RevisionNotFound",
        "/hf/api/models/pair/a/tree/main/folder": "EntryNotFound",
    }.items():
        answer = http.get(path)
        assert (answer.status_code, answer.headers["x-error-code"]) == (404, code), path
        assert answer.json()["detail"] == answer.headers["x-error-message"]


def test_listings_tell_what_loads_a_repository(
    http: httpx.Client, pair: Pair, merged: dict[str, Any], tmp_path: Path
) -> None:
    def labels(repo: str) -> tuple[str | None, list[str]]:
        found = http.get(f"/hf/api/models/{repo}").json()
        return found.get("library_name"), found["tags"]

    base = [f"base_model:{b}"] if (b := http.get("/v1/models/pair/a").json()["base_model"]) else []
    assert labels("pair/a") == ("peft", ["peft", "safetensors", "lora", *base])
    name, tags = labels(f"merges/{merged['id']}")
    assert (name, tags[:4]) == ("peft", ["peft", "safetensors", "lora", "merge"])
    done = http.post(
        "/v1/merges", json=pair.recipe(output={"format": "delta"}), headers={"Prefer": "wait=60"}
    ).json()
    assert done["state"] == "succeeded", done
    name, tags = labels(f"merges/{done['id']}")
    assert (name, tags[:3]) == (None, ["safetensors", "task-vector", "merge"])
    style = write_kohya(tmp_path / "style.safetensors", kohya_layers())
    http.put("/v1/models/hub/style/files/style.safetensors", content=style.read_bytes())
    assert http.post("/v1/models/hub/style/commit").status_code == 201
    assert labels("hub/style") == ("diffusers", ["diffusers", "safetensors", "lora"])
    http.post("/hf/api/repos/create", json={"name": "nothing", "organization": "hub"})
    assert labels("hub/nothing") == (None, [])


def test_paths_come_as_a_form(http: httpx.Client, pair: Pair) -> None:
    path = "/hf/api/models/pair/a/paths-info/main"
    answer = http.post(path, data={"paths": ["adapter_config.json", "no", "adapter_config.json"]})
    assert [row["path"] for row in answer.json()] == ["adapter_config.json"]
    assert http.post(path).json() == []
    for body in (b"paths=x&" * 3000, b"\xff\xfe"):
        assert http.post(path, content=body).json()["code"] == "form_invalid"
