"""Unmodified Hub clients use the service as their Hub, over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter

from service.client import Client
from tests.running import ROOT, Up, push
from tests.service.conftest import Pair
from tests.service.hub_client import python

READ = """
import hashlib, json, pathlib, sys
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub import errors
model, merge, multi, cache = sys.argv[1:]
api = HfApi()

def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    return None

def snapshot(repo):
    folder = pathlib.Path(snapshot_download(repo, cache_dir=cache))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "commit": folder.name,
        "files": {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files},
    }

name, _, revision = model.partition("@")
info = api.model_info(merge, files_metadata=True)
print(json.dumps({
    "user": api.whoami()["name"],
    "id": info.id, "sha": info.sha, "private": info.private, "tags": info.tags,
    "info_at": api.model_info(name, revision=revision).sha,
    "siblings": {s.rfilename: [s.size, s.lfs.sha256] for s in info.siblings},
    "list": sorted(api.list_repo_files(merge)),
    "tree": sorted(item.path for item in api.list_repo_tree(multi)),
    "deep": sorted(item.path for item in api.list_repo_tree(multi, recursive=True)),
    "paths": [i.path for i in api.get_paths_info(merge, ["adapter_config.json", "nope.json"])],
    "refs": [[b.name, b.target_commit] for b in api.list_repo_refs(merge).branches],
    "exists": [api.repo_exists(merge), api.repo_exists("merges/none"), api.file_exists(merge, "README.md"),
               api.file_exists(merge, "x.json"), api.revision_exists(name, revision),
               api.revision_exists(name, "0" * 40)],
    "tensors": sorted(api.parse_safetensors_file_metadata(merge, "adapter_model.safetensors").tensors),
    "fs": sorted(path.rpartition("/")[2] for path in HfFileSystem().ls(merge, detail=False)),
    "snapshot": snapshot(merge), "snapshot_multi": snapshot(multi),
    "one": hf_hub_download(name, "adapter_config.json", revision=revision, cache_dir=cache),
    "refused": [refused(api.model_info, "no/such"), refused(api.model_info, name, revision="0" * 40),
                refused(api.model_info, name, revision="v1"),
                refused(hf_hub_download, name, "no.json", cache_dir=cache),
                refused(snapshot_download, "merges/none", cache_dir=cache)],
}))
"""

LOAD = """
import sys, torch
from peft import PeftModel
merge, folder, subfolder = sys.argv[1:]

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = torch.nn.Linear(16, 24), torch.nn.Linear(16, 12)
    def forward(self, x):
        return torch.cat([self.q_proj(x), self.v_proj(x)], -1)

class Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)

x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    more = {"subfolder": subfolder} if subfolder else {}
    plain = Base()(x)
    served = PeftModel.from_pretrained(Base(), merge, **more)(x)
    local = PeftModel.from_pretrained(Base(), f"{folder}/{subfolder}" if subfolder else folder)(x)
print([float((served - local).abs().max()), float((served - plain).abs().max())])
"""


@pytest.fixture(scope="module")
def multi(up: Up, pair: Pair) -> dict[str, Any]:
    """A merge with one output for each of its inputs."""
    recipe = pair.recipe(merge_method="rmm")
    with up.client() as client:
        done = client.wait(client.submit(recipe)["id"])
    assert done["state"] == "succeeded", done
    return done


def files_of(up: Up, merge: dict[str, Any]) -> dict[str, str]:
    return {item["path"]: item["sha256"] for item in up.http.get(merge["links"]["files"]).json()}


def test_huggingface_hub_reads_models_and_results(
    up: Up, pair: Pair, merged: dict[str, Any], multi: dict[str, Any], tmp_path: Path
) -> None:
    merge, several = f"merges/{merged['id']}", f"merges/{multi['id']}"
    found = python(up, tmp_path, READ, pair.models[0], merge, several, str(tmp_path / "cache"))
    files, outputs = files_of(up, merged), files_of(up, multi)
    assert found["user"] == "local"
    assert (found["id"], found["private"]) == (merge, True)
    assert len(found["sha"]) == 40
    assert found["info_at"] == pair.models[0].partition("@")[2]
    assert {path: row[1] for path, row in found["siblings"].items()} == files
    assert found["list"] == sorted(files)
    folders = {path.partition("/")[0] for path in outputs if "/" in path}
    assert len(folders) == 2
    assert found["tree"] == sorted(folders | {path for path in outputs if "/" not in path})
    assert found["deep"] == sorted(folders | set(outputs))
    assert found["paths"] == ["adapter_config.json"]
    assert found["refs"] == [["main", found["sha"]]]
    assert found["exists"] == [True, False, True, False, True, False]
    assert len(found["tensors"]) == 8
    assert found["fs"] == sorted(files)
    assert found["snapshot"] == {"commit": found["sha"], "files": files}
    assert found["snapshot_multi"]["files"] == outputs
    assert Path(found["one"]).read_bytes() == (pair.folders[0] / "adapter_config.json").read_bytes()
    assert found["refused"] == [
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "RevisionNotFoundError",
        "RemoteEntryNotFoundError",
        "RepositoryNotFoundError",
    ]


def test_peft_loads_a_result_by_its_name(
    up: Up, client: Client, merged: dict[str, Any], tmp_path: Path
) -> None:
    client.download_result(merged["id"], tmp_path / "local")
    difference, effect = python(up, tmp_path, LOAD, f"merges/{merged['id']}", str(tmp_path / "local"), "")
    assert difference == 0.0
    assert effect > 0.01


def test_peft_loads_one_output_of_several(
    up: Up, client: Client, multi: dict[str, Any], tmp_path: Path
) -> None:
    client.download_result(multi["id"], tmp_path / "local")
    folder = min(path.partition("/")[0] for path in files_of(up, multi) if "/" in path)
    difference, effect = python(up, tmp_path, LOAD, f"merges/{multi['id']}", str(tmp_path / "local"), folder)
    assert difference == 0.0
    assert effect > 0.01


def test_a_commit_names_its_content(up: Up, client: Client, tmp_path: Path) -> None:
    def sha() -> str:
        return str(up.http.get("/hf/api/models/hub/changing").json()["sha"])

    first = push(client, write_adapter(tmp_path / "1", seed=1), "hub/changing").partition("@")[2]
    assert sha() == first
    second = push(client, write_adapter(tmp_path / "2", seed=2), "hub/changing").partition("@")[2]
    assert sha() == second != first
    old = up.http.get(f"/hf/hub/changing/resolve/{first}/adapter_model.safetensors")
    assert old.headers["x-repo-commit"] == first
    assert old.content == (tmp_path / "1" / "adapter_model.safetensors").read_bytes()


def test_a_merge_on_this_machine_takes_models_of_a_hub(up: Up, pair: Pair, tmp_path: Path) -> None:
    models = [{"model": f"hf://{pair.models[0].partition('@')[0]}"}, {"model": str(pair.folders[1])}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models}))
    script = (
        "import sys; from service.cli import main; "
        "code = main(['merge', sys.argv[1], '--out', 'out', '--quiet']); print(code or 0)"
    )
    assert python(up, tmp_path, script, str(recipe), path=str(ROOT)) == 0
    resolved = (tmp_path / "out" / "merge.yaml").read_text()
    assert f"hf://{pair.models[0]}" in resolved, "the reference names the commit"
