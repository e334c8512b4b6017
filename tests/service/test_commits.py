"""A commit may say what it is to be made of; then nothing else gets into the revision."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from adapters import write_adapter

from service.client import Client
from tests.running import Up

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def held(revision: dict[str, object]) -> dict[str, str]:
    listed = revision["files"]
    assert isinstance(listed, list)
    return {item["path"]: item["sha256"] for item in listed}


def upload(http: httpx.Client, model: str, folder: Path) -> None:
    for path in folder.iterdir():
        assert http.put(f"/v1/models/{model}/files/{path.name}", content=path.read_bytes()).status_code == 201


def test_what_an_earlier_try_left_does_not_get_in(http: httpx.Client, client: Client, tmp_path: Path) -> None:
    http.put("/v1/models/commits/left/files/notes.md", content=b"of a push that failed")
    http.put(f"/v1/models/commits/left/files/{CONFIG}", content=b'{"peft_type": "LORA", "r": "many"}')
    assert http.post("/v1/models/commits/left/commit").status_code == 422
    folder = write_adapter(tmp_path / "a", seed=1)
    assert held(client.push_dir(folder, "commits/left")) == files(folder)


def test_pushes_at_the_same_time_do_not_mix(up: Up, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(6)]

    def push(folder: Path) -> dict[str, str]:
        with up.client() as client:
            return held(client.push_dir(folder, "commits/busy"))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(push, folders)) == [files(folder) for folder in folders]
    assert len(up.http.get("/v1/models/commits/busy/revisions").json()["data"]) == 6


def test_files_stay_staged_for_whoever_did_not_name_them(http: httpx.Client, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", seed=2)
    upload(http, "commits/some", folder)
    http.put("/v1/models/commits/some/files/notes.md", content=b"more")
    named = http.post("/v1/models/commits/some/commit", json={"files": files(folder)})
    assert (named.status_code, held(named.json())) == (201, files(folder))
    again = http.post("/v1/models/commits/some/commit")
    assert again.json()["code"] == "adapter_config_missing", "only the notes are staged"


@pytest.mark.parametrize(
    ("wanted", "status", "code"),
    [
        ({CONFIG: "0" * 64}, 409, "file_not_uploaded"),
        ({CONFIG: "x"}, 422, "request_invalid"),
        ({}, 409, "nothing_to_commit"),
        ({"../a.json": None}, 422, "path_invalid"),
        ({"a.bin": None}, 422, "pickle_not_accepted"),
        ({"a.json": None, "a.json/b.json": None}, 409, "path_conflict"),
    ],
)
def test_what_cannot_be_made_is_refused(
    http: httpx.Client, wanted: dict[str, str | None], status: int, code: str
) -> None:
    known = http.put("/v1/models/commits/no/files/known.json", content=b"{}").json()["sha256"]
    body = {"files": {path: sha256 or known for path, sha256 in wanted.items()}}
    answer = http.post("/v1/models/commits/no/commit", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_content_of_another_name_is_looked_at_again(http: httpx.Client) -> None:
    """A body that opens like the head of weights is none under the name of weights."""
    sent = http.put("/v1/models/commits/renamed/files/a.json", content=b'{"a": 1}' * 100).json()
    body = {"files": {WEIGHTS: sent["sha256"], CONFIG: sent["sha256"]}}
    answer = http.post("/v1/models/commits/renamed/commit", json=body)
    assert answer.status_code == 422
    assert http.get("/v1/models/commits/renamed").status_code == 404


@pytest.mark.parametrize("name", ["other.safetensors", "sub/adapter_model.safetensors"])
def test_weights_beside_the_model_must_be_sound_too(http: httpx.Client, tmp_path: Path, name: str) -> None:
    upload(http, f"commits/{name[:3]}", write_adapter(tmp_path / "a", seed=3))
    http.put(f"/v1/models/commits/{name[:3]}/files/{name}", content=b"\xff" * 64)
    answer = http.post(f"/v1/models/commits/{name[:3]}/commit")
    assert answer.status_code == 422
    assert answer.json()["code"].startswith("safetensors_")
    assert name in answer.text
