"""The whole service over a bucket: upload, merge, download, and what a Hub client reads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapters import write_adapter

from tests.running import ROOT, Up, push
from tests.seaweed import OWNER, Seaweed, in_bucket

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(seaweed: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with in_bucket(seaweed, seaweed.url()):
        up = Up(tmp_path_factory.mktemp("s3"))
        yield up
        assert up.stop() == 0, up.log()


def test_a_merge_comes_out_of_a_bucket(service: Up, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(2)]
    with service.client() as client:
        models = [push(client, folder, f"s3/m{i}") for i, folder in enumerate(folders)]
        recipe = {"merge_method": "linear", "models": [{"model": name} for name in models]}
        done = client.wait(client.submit(recipe)["id"])
        assert done["state"] == "succeeded", done
        client.download_result(done["id"], tmp_path / "out")
        again = client.submit(recipe)
        assert again["cached_from"] == done["id"]
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    sums = {entry["path"]: entry["sha256"] for entry in done["result"]["files"]}
    assert sums["adapter_model.safetensors"] == hashlib.sha256(weights).hexdigest()

    part = service.http.get(
        f"/v1/merges/{again['id']}/files/adapter_model.safetensors", headers={"Range": "bytes=10-99"}
    )
    assert (part.status_code, part.content) == (206, weights[10:100])
    hub = service.http.get(f"/hf/merges/{done['id']}/resolve/main/adapter_model.safetensors")
    assert (hub.status_code, hub.content) == (200, weights)
    model = models[0].partition("@")[0]
    listing = service.http.get(f"/hf/api/models/{model}").json()
    assert {item["rfilename"] for item in listing["siblings"]} == {path.name for path in folders[0].iterdir()}
    assert service.http.delete(f"/v1/merges/{done['id']}").status_code == 204
    gone = service.http.get(f"/v1/merges/{done['id']}/files/adapter_model.safetensors")
    assert gone.status_code == 404


def test_the_data_folder_holds_no_object_and_the_log_no_secret(service: Up) -> None:
    assert not service.storage.exists()
    assert OWNER[1] not in service.log()
    assert service.http.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("bucket", "secret", "code"),
    [("nowhere", OWNER[1], "storage_bucket_missing"), ("merganser", "wrong", "storage_denied")],
)
@pytest.mark.parametrize("command", [("workers", "up"), ("service", "serve")], ids=["up", "serve"])
def test_a_wrong_setting_stops_the_start(
    seaweed: Seaweed, tmp_path: Path, command: tuple[str, str], bucket: str, secret: str, code: str
) -> None:
    environment = {
        **os.environ,
        **seaweed.environment((OWNER[0], secret)),
        "PYTHONPATH": str(ROOT),
        "MERGANSER_DATA_DIR": str(tmp_path / "data"),
        "MERGANSER_STORAGE_URL": f"s3://{bucket}/p",
        "MERGANSER_PORT": "0",
    }
    if command[1] == "serve":
        environment["MERGANSER_REDIS_URL"] = f"unix://{tmp_path}/none.sock"
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"[{code}]" in done.stderr
    assert secret not in done.stderr
