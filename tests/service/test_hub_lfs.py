"""Files that go ahead of their commit: Git LFS, in one piece and in parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapters import write_adapter

from service.auth import Keys, Scope
from service.storage import Storage
from tests.running import Up
from tests.service.hub_client import python
from tests.service.test_hub_writing import body, made

SEND = """
import json, sys
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub import _commit_api
folder, repo = sys.argv[1:]
sent = []
ask, upload = _commit_api._fetch_upload_modes, _commit_api.lfs_upload

def fetch(additions, **more):  # as the server says it of larger files
    ask(additions=additions, **more)
    for item in additions:
        if item.path_in_repo.endswith(".safetensors"):
            item._upload_mode, item._remote_oid = "lfs", None

def lfs_upload(**more):
    sent.append(more["operation"].path_in_repo)
    upload(**more)

_commit_api._fetch_upload_modes, _commit_api.lfs_upload = fetch, lfs_upload
api = HfApi()
api.create_repo(repo, exist_ok=True)
first = api.upload_folder(repo_id=repo, folder_path=folder).oid
second = api.upload_folder(repo_id=repo, folder_path=folder).oid
print(json.dumps([first, second, sorted(api.list_repo_files(repo)), sent]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    modules = {f"layers.{i}.q_proj": (512, 512) for i in range(4)}
    return write_adapter(tmp_path_factory.mktemp("lfs") / "a", seed=71, rank=64, modules=modules)


def test_a_client_without_xet_sends_lfs_objects(up: Up, folder: Path, tmp_path: Path) -> None:
    more = {"HF_HUB_DISABLE_XET": "1"}
    first, second, files, sent = python(up, tmp_path, SEND, str(folder), "lfs/client", **more)
    assert first == second
    assert sent == ["adapter_model.safetensors"], "it is sent once"
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    stored = up.http.get("/v1/models/lfs/client").json()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert stored["files"][1]["sha256"] == hashlib.sha256(weights).hexdigest()


def batch(http: httpx.Client, model: str, content: bytes, **more: Any) -> dict[str, Any]:
    """What is said of one object."""
    asked = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
    answer = http.post(
        f"/hf/{model}.git/info/lfs/objects/batch",
        json={"operation": "upload", "transfers": ["basic", "multipart"], "objects": [asked], **more},
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/vnd.git-lfs+json"
    (row,) = answer.json()["objects"]
    assert (row["oid"], row["size"]) == (asked["oid"], asked["size"])
    return dict(row)


def test_a_small_object_goes_in_one_piece(http: httpx.Client) -> None:
    at = made(http, "lfs/basic")
    content = b'{"a": "basic"}'
    upload = batch(http, "lfs/basic", content)["actions"]["upload"]
    assert "header" not in upload
    assert http.put(upload["href"], content=content[:-1]).json()["code"] == "content_digest_mismatch"
    assert http.put(upload["href"], content=content + b"x").status_code == 413
    other = upload["href"].replace(hashlib.sha256(content).hexdigest(), "0" * 64)
    assert http.put(other, content=content).json()["code"] == "signature_invalid"
    for _ in range(2):
        assert http.put(upload["href"], content=content).status_code == 200
    assert "actions" not in batch(http, "lfs/basic", content), "it is there"
    line = {"path": "a.json", "algo": "sha256", "oid": hashlib.sha256(content).hexdigest(), "size": 14}
    assert http.post(f"{at}/commit/main", content=body(("lfsFile", line))).status_code == 200
    assert http.get("/hf/lfs/basic/resolve/main/a.json").content == content


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A service with keys, which takes larger files than the shared one."""
    running = Up(tmp_path_factory.mktemp("keyed"), auth="keys")
    yield running
    assert running.stop() == 0, running.log()


def key(up: Up, tenant: str, scope: Scope) -> str:
    return Keys(Storage.open(up.storage.as_uri())).create(tenant, [scope])[0]


def test_a_large_object_goes_in_parts_that_need_no_key(keyed: Up) -> None:
    with httpx.Client(base_url=keyed.url, timeout=30, trust_env=False) as http:
        http.headers["Authorization"] = f"Bearer {key(keyed, 'owner', 'write')}"
        at = made(http, "lfs/parts")
        content = b'{"a": "' + b"x" * (40 << 20) + b'"}'
        upload = batch(http, "lfs/parts", content)["actions"]["upload"]
        size = int(upload["header"]["chunk_size"])
        urls = [upload["header"][name] for name in sorted(upload["header"]) if name.isdigit()]
        assert len(urls) == -(-len(content) // size) > 1
        oid = hashlib.sha256(content).hexdigest()
        done = {"oid": oid, "parts": []}
        for number, url in enumerate(urls):
            answer = keyed.http.put(url, content=content[number * size : (number + 1) * size])
            done["parts"].append({"partNumber": number + 1, "etag": answer.headers["etag"]})  # type: ignore
        assert keyed.http.post(urls[0], json=done).status_code in (401, 403, 405)
        assert keyed.http.post(upload["href"], json=done).status_code == 200
        line = {"path": "a.json", "algo": "sha256", "oid": oid, "size": len(content)}
        assert http.post(f"{at}/commit/main", content=body(("lfsFile", line))).status_code == 200
        assert "actions" not in batch(http, "lfs/parts", content)
        http.headers["Authorization"] = f"Bearer {key(keyed, 'stranger', 'write')}"
        theirs = made(http, "lfs/parts")
        assert "actions" in batch(http, "lfs/parts", content), "nobody learns what others have"
        refused = http.post(f"{theirs}/commit/main", content=body(("lfsFile", line)))
        assert refused.json()["code"] == "content_not_uploaded"


def test_clients_write_with_a_key_that_may(keyed: Up, folder: Path, tmp_path: Path) -> None:
    may = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": key(keyed, "owner", "write")}
    first, second, _, sent = python(keyed, tmp_path, SEND, str(folder), "lfs/keyed", **may)
    assert first == second
    assert len(sent) == 1
    with httpx.Client(base_url=keyed.url, timeout=30, trust_env=False) as http:
        http.headers["Authorization"] = f"Bearer {key(keyed, 'owner', 'read')}"
        assert http.get("/hf/api/models/lfs/keyed").status_code == 200
        for path in ("/hf/api/repos/create", "/hf/api/models/lfs/keyed/commit/main"):
            answer = http.post(path, json={"name": "x"})
            assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")
        assert http.post("/hf/api/validate-yaml", json={"content": "# x"}).status_code == 200


def test_content_is_refused_before_it_is_committed(http: httpx.Client) -> None:
    at = made(http, "lfs/refused")
    pickle = b"\x80\x02}" + bytes(600)
    upload = batch(http, "lfs/refused", pickle)["actions"]["upload"]
    assert http.put(upload["href"], content=pickle).json()["code"] == "pickle_not_accepted"
    too_large = http.post(
        "/hf/lfs/refused.git/info/lfs/objects/batch",
        json={"operation": "upload", "objects": [{"oid": "0" * 64, "size": 1 << 40}]},
    )
    assert too_large.json()["objects"][0]["error"]["message"].startswith("file_too_large")
    for asked in (
        {"operation": "download", "objects": []},
        {"operation": "upload", "objects": [{"oid": "../x", "size": 1}]},
        {"operation": "upload", "objects": [{"oid": "0" * 64, "size": -1}]},
        {"operation": "upload", "objects": {}},
    ):
        assert http.post("/hf/lfs/refused.git/info/lfs/objects/batch", json=asked).status_code == 422
    missing = http.post("/hf/lfs/none.git/info/lfs/objects/batch", json={})
    assert (missing.status_code, missing.headers["x-error-code"]) == (404, "RepoNotFound")
    assert http.get(f"{at}/tree/main").json() == []
