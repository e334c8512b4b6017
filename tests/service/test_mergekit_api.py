"""mergekit configurations over HTTP: run as they are on local folders, pinned, repeated, refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapters import write_adapter
from safetensors.torch import load_file

from benchmarks.checkpoint_inputs import Shape, write_checkpoints
from merging import merge
from service import cli
from service.client import Client
from tests.running import Up, push

SHAPE = Shape(hidden=16, inner=24, heads=2, kv_heads=1, layers=3, vocab=32)
POST = "/v1/merges"


@dataclass(frozen=True)
class Models:
    """A base and its fine-tunes: their names in the service with revisions, and their folders."""

    folders: Mapping[str, Path]

    @property
    def pinned(self) -> list[str]:
        return list(self.folders)

    @property
    def names(self) -> list[str]:
        return [name.partition("@")[0] for name in self.folders]

    def stacked(self, **more: Any) -> dict[str, Any]:
        """Layers of two models on top of each other."""
        return {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": self.names[1], "layer_range": [0, 2]}]},
                {"sources": [{"model": self.names[2], "layer_range": [1, 3]}]},
            ],
            "dtype": "float32",
            **more,
        }

    def graded(self, **more: Any) -> dict[str, Any]:
        """Parameters with a gradient and with filters."""
        weight = [{"filter": "mlp", "value": 0.3}, {"value": 0.7}]
        return {
            "merge_method": "ties",
            "base_model": self.names[0],
            "models": [
                {"model": self.names[1], "parameters": {"density": [0.2, 0.8], "weight": 1.0}},
                {"model": self.names[2], "parameters": {"density": 0.5, "weight": weight}},
            ],
            "parameters": {"normalize": True},
            "dtype": "float32",
            "tokenizer_source": self.names[3],
            **more,
        }


@pytest.fixture(scope="module")
def models(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folders = write_checkpoints(tmp_path_factory.mktemp("checkpoints"), SHAPE, dtype="float32")
    with up.client() as client:
        return Models({push(client, folder, f"kit/{folder.name}"): folder for folder in folders})


def finished(client: Client, document: dict[str, Any]) -> dict[str, Any]:
    done = client.wait(client.submit(document)["id"])
    assert done["state"] == "succeeded", done
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()
    }


def assert_same(got: Path, expected: Path) -> None:
    assert weights(got).keys() == weights(expected).keys()
    assert all(torch.equal(value, weights(expected)[key]) for key, value in weights(got).items())


@pytest.mark.parametrize("kind", ["stacked", "graded"])
def test_a_configuration_gives_what_it_gives_on_local_folders(
    client: Client, models: Models, kind: str, tmp_path: Path
) -> None:
    document = getattr(models, kind)()
    planned = client.plan(document)
    done = finished(client, document)
    client.download_result(done["id"], tmp_path / "got")
    folders = {name.partition("@")[0]: folder for name, folder in models.folders.items()}
    merge(document, tmp_path / "alone", resolve=folders.__getitem__, device="cpu")
    assert_same(tmp_path / "got", tmp_path / "alone")
    assert planned["parameters"] == {"compat": "mergekit"}
    assert {module["name"] for module in planned["modules"]} == set(weights(tmp_path / "got"))


def test_the_record_keeps_the_configuration_with_revisions(client: Client, models: Models) -> None:
    base, first, second, third = models.pinned
    kept = finished(client, models.graded())["recipe"]
    assert (kept["compat"], kept["seed"], kept["tokenizer_source"]) == ("mergekit", 0, third)
    assert (kept["base_model"], [entry["model"] for entry in kept["models"]]) == (base, [first, second])
    assert kept["models"][0]["parameters"] == models.graded()["models"][0]["parameters"]
    sources = finished(client, models.stacked())["recipe"]["slices"]
    assert [part["sources"][0]["model"] for part in sources] == [first, second]
    assert [part["sources"][0]["layer_range"] for part in sources] == [[0, 2], [1, 3]]


def test_whole_models_without_an_output_are_a_configuration(
    client: Client, models: Models, tmp_path: Path
) -> None:
    document = {"merge_method": "linear", "models": [{"model": name} for name in models.names[1:3]]}
    for entry in document["models"]:
        entry["parameters"] = {"weight": 1.0}  # which recipes would add up, and mergekit divides by two
    done = finished(client, document)
    assert done["recipe"]["compat"] == "mergekit"
    client.download_result(done["id"], tmp_path / "got")
    key = "model.layers.0.mlp.up_proj.weight"
    first, second = (weights(models.folders[name])[key] for name in models.pinned[1:3])
    torch.testing.assert_close(weights(tmp_path / "got")[key], (first + second) / 2)


def test_a_result_is_a_model_of_the_next_configuration(
    client: Client, models: Models, tmp_path: Path
) -> None:
    first = finished(client, models.stacked())
    document = {"merge_method": "linear", "models": [{"model": f"merges/{first['id']}"}]}
    document["models"][0]["parameters"] = {"weight": 2.0}
    second = finished(client, document)
    assert second["recipe"]["compat"] == "mergekit"
    for name, done in (("first", first), ("second", second)):
        client.download_result(done["id"], tmp_path / name)
    assert_same(tmp_path / "second", tmp_path / "first")


def test_adapters_stay_a_recipe(client: Client, http: httpx.Client, tmp_path: Path) -> None:
    names = [push(client, write_adapter(tmp_path / str(i), seed=i), f"kit/adapter-{i}") for i in (1, 2)]
    document = {"merge_method": "linear", "models": [{"model": name} for name in names], "compat": "mergekit"}
    kept = http.post(POST, json=document).json()["recipe"]
    assert (kept["parameters"], kept["output"]["format"]) == ({"compat": "mergekit"}, "lora")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"merge_method": "karcher"}, "mergekit_method_unsupported"),
        ({"chat_template": "chatml"}, "mergekit_unsupported"),
        ({"output": {"format": "lora"}}, "mergekit_unknown_key"),
        ({"parameters": {"normalize": True, "densty": 0.5}}, "mergekit_unknown_parameter"),
        ({"parameters": {"normalize": 10**400}}, "mergekit_parameter_value"),
        ({"dtype": "int8"}, "mergekit_dtype"),
        ({"base_model": "kit/nowhere"}, "model_not_found"),
        ({"base_model": "/models/base"}, "model_reference_invalid"),
        ({"base_model": "hf://org/name"}, "mergekit_remote_model"),
        ({"priority": "urgent"}, "recipe_invalid_value"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(
    http: httpx.Client, models: Models, change: dict[str, Any], code: str
) -> None:
    for path in (POST, f"{POST}/plan"):
        answer = http.post(path, json=models.graded(**change))
        assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text


def test_what_only_the_headers_tell_is_refused_before_there_is_a_job(
    http: httpx.Client, models: Models
) -> None:
    document = models.stacked()
    document["slices"][1]["sources"][0]["layer_range"] = [2, 9]
    answer = http.post(POST, json=document)
    assert (answer.status_code, answer.json()["code"]) == (422, "mergekit_layers")
    document["slices"] = [document["slices"][0]] * 1001
    answer = http.post(POST, json=document)
    assert (answer.status_code, answer.json()["code"]) == (422, "mergekit_too_many_layers")


@pytest.mark.parametrize("value", [float("nan"), "\ud800"])
def test_what_json_cannot_carry_is_refused(http: httpx.Client, models: Models, value: Any) -> None:
    body = json.dumps(models.graded(parameters={"select_topk": value}))
    answer = http.post(POST, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (422, "recipe_type")


def test_the_same_configuration_is_not_run_again(client: Client, http: httpx.Client, models: Models) -> None:
    first = finished(client, models.graded(seed=5))
    again = http.post(POST, json=models.graded(seed=5, name="again"))
    assert (again.status_code, again.json()["cached_from"]) == (200, first["id"])
    assert http.post(POST, json=models.graded(seed=6)).json()["cached_from"] is None


def test_a_key_stands_for_one_configuration(http: httpx.Client, models: Models) -> None:
    headers = {"Idempotency-Key": "kit-one"}
    first, second = (http.post(POST, json=models.graded(seed=7), headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotency-replayed"] == "true"
    answer = http.post(POST, json=models.graded(seed=8), headers=headers)
    assert answer.json()["code"] == "idempotency_key_reused"


def test_submit_uploads_the_models_of_a_configuration(
    up: Up, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = {name.partition("@")[0]: str(folder) for name, folder in models.folders.items()}
    text = json.dumps(models.graded())
    for name, folder in local.items():
        text = text.replace(json.dumps(name), json.dumps(folder))
    path = tmp_path / "config.yaml"
    path.write_text(text)
    out, there = tmp_path / "out", tmp_path / "there"
    arguments = ["submit", str(path), "--push", "pushed", "--out", str(out), "--url", up.url, "--quiet"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    merge(path, there, device="cpu")
    assert_same(out, there)
