"""The client commands against a running service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import products, write_adapter
from safetensors.torch import save_file

from merging import load_adapter
from merging.calibration.statistics_file import METADATA_KEY
from service import cli
from tests.running import Up
from tests.service.conftest import Pair


def write_recipe(path: Path, models: list[str], **more: Any) -> Path:
    """A recipe file; JSON is YAML."""
    recipe = {"merge_method": "linear", "models": [{"model": model} for model in models], **more}
    path.write_text(json.dumps(recipe))
    return path


def test_push_prints_the_revision_and_pull_brings_the_same_files(
    up: Up, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_adapter(tmp_path / "mine", seed=3)
    assert cli.main(["push", str(folder), "cli/mine", "--url", up.url]) == 0
    reference = capsys.readouterr().out.strip()
    assert reference.startswith("cli/mine@")

    assert cli.main(["pull", reference, str(tmp_path / "back"), "--url", up.url]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'back'}\n"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def test_submit_prints_the_id_of_the_merge(
    up: Up, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", list(pair.models))
    assert cli.main(["submit", str(recipe), "--url", up.url]) == 0
    merge_id = capsys.readouterr().out.strip()
    assert up.http.get(f"/v1/merges/{merge_id}").json()["id"] == merge_id


def test_submit_pushes_local_folders_follows_and_downloads(
    up: Up, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", [str(folder) for folder in pair.folders])
    out = tmp_path / "merged"
    assert cli.main(["submit", str(recipe), "--push", "local", "--out", str(out), "--url", up.url]) == 0
    printed, progress = capsys.readouterr()
    assert printed == f"{out}\n"
    assert "pushed" in progress
    assert "succeeded 100 %" in progress

    there = tmp_path / "there"
    assert cli.main(["merge", str(recipe), "--out", str(there), "--quiet"]) == 0
    here = products(out)
    assert here.keys() == products(there).keys()
    for name, delta in products(there).items():
        assert (delta == here[name]).all(), name


def write_statistics(path: Path, folder: Path, seed: int) -> Path:
    """A statistics file for an adapter, of inputs drawn at random."""
    with load_adapter(folder) as adapter:
        modules = {m.name: {"m": m.m, "n": m.n, "source": m.name} for m in adapter.modules.values()}
        told = {
            "version": 1, "base": "0" * 64, "features": "model", "model": adapter.digest, "data": "1" * 64,
            "samples": 50, "rows": 50, "row": "tokens", "statistic": "gram", "modules": modules,
        }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in modules.items():
        rows = torch.randn(50, int(str(module["n"])), generator=generator)
        tensors |= {f"{name}.gram": rows.mT @ rows / 50, f"{name}.mean": rows.mean(0)}
    save_file(tensors, str(path), metadata={METADATA_KEY: json.dumps(told)})
    return path


def test_submit_pushes_what_a_method_looks_at(
    up: Up, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", [], merge_method="regmean")
    told = json.loads(recipe.read_text())
    for t, folder in enumerate(pair.folders):
        file = write_statistics(tmp_path / f"task{t}.safetensors", folder, seed=t)
        told["models"].append({"model": str(folder), "statistics": str(file)})
    recipe.write_text(json.dumps(told))
    out, there = tmp_path / "merged", tmp_path / "there"
    assert cli.main(["submit", str(recipe), "--push", "local", "--out", str(out), "--url", up.url]) == 0
    assert "pushed" in capsys.readouterr().err
    assert cli.main(["merge", str(recipe), "--out", str(there), "--quiet"]) == 0
    here = products(out)
    assert here.keys() == products(there).keys()
    for name, delta in products(there).items():
        assert (delta == here[name]).all(), name


@pytest.mark.parametrize("wait", [True, False])
def test_submit_refuses_what_the_service_refuses(
    wait: bool, up: Up, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", ["nobody/nothing"])
    arguments = ["submit", str(recipe), "--url", up.url] + ["--wait"] * wait
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "nobody/nothing" in err
    assert err.endswith("[model_not_found]\n")


def test_a_service_that_is_not_there_is_a_failure(
    tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = "http://127.0.0.1:9"  # the discard port: nothing listens
    assert cli.main(["push", str(pair.folders[0]), "cli/x", "--url", nowhere]) == 1
    assert capsys.readouterr().err.endswith("[service_unreachable]\n")


def test_pull_refuses_a_folder_that_holds_something(
    up: Up, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("keep me")
    assert cli.main(["pull", pair.models[0], str(tmp_path), "--url", up.url]) == 2
    assert capsys.readouterr().err.endswith("[output_exists]\n")
    assert (tmp_path / "precious").read_text() == "keep me"
