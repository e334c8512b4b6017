"""Merges over HTTP: plan, request, follow, read, download, and what is refused."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from adapters import products, write_adapter

from merging.errors import InputError
from service.client import Client
from tests.running import Up, push
from tests.service.conftest import Pair


def test_the_result_is_the_merge(client: Client, pair: Pair, merged: dict[str, Any], tmp_path: Path) -> None:
    client.download_result(merged["id"], tmp_path / "out")
    first, second = (products(folder) for folder in pair.folders)
    for name, delta in products(tmp_path / "out").items():
        torch.testing.assert_close(delta, first[name] + second[name], rtol=1e-5, atol=1e-6)


def test_a_merge_is_accepted_with_its_location(http: httpx.Client, pair: Pair) -> None:
    answer = http.post("/v1/merges", json=pair.recipe(name="mine"))
    assert answer.status_code == 202
    body = answer.json()
    assert answer.headers["location"] == body["links"]["self"] == f"/v1/merges/{body['id']}"
    assert (body["state"], body["name"], body["progress"]) == ("queued", "mine", 0.0)
    assert [entry["model"] for entry in body["recipe"]["models"]] == list(pair.models)


def test_models_are_pinned_when_the_merge_is_requested(
    client: Client, http: httpx.Client, tmp_path: Path
) -> None:
    pinned = push(client, write_adapter(tmp_path / "1", seed=1), "pin/a")
    body = http.post("/v1/merges", json={"merge_method": "linear", "models": [{"model": "pin/a"}]}).json()
    assert body["recipe"]["models"][0]["model"] == pinned


def test_a_finished_merge_tells_everything(http: httpx.Client, merged: dict[str, Any]) -> None:
    found = http.get(merged["links"]["self"]).json()
    assert (found["state"], found["progress"], found["attempts"]) == ("succeeded", 1.0, 1)
    assert found["created_at"] <= found["started_at"] <= found["finished_at"]
    assert found["error"] is None
    files = {entry["path"]: entry for entry in http.get(found["links"]["files"]).json()}
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge.yaml",
        "report.json",
    }
    for path, entry in files.items():
        data = http.get(f"{found['links']['files']}/{path}").content
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry["sha256"], entry["size"])
    report = http.get(found["links"]["report"]).json()
    assert report["recipe_digest"] == found["result"]["recipe_digest"]


def test_a_result_is_a_model_of_the_next_merge(
    client: Client, pair: Pair, merged: dict[str, Any], tmp_path: Path
) -> None:
    name = merged["result"]["model"]
    models = [{"model": name, "parameters": {"weight": 0.5}}, {"model": pair.models[0]}]
    done = client.wait(client.submit({"merge_method": "linear", "models": models})["id"])
    client.download_result(done["id"], tmp_path / "out")
    first, second = (products(folder) for folder in pair.folders)
    for module, delta in products(tmp_path / "out").items():
        expected = 1.5 * first[module] + 0.5 * second[module]
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)


def test_the_resolved_recipe_gives_the_same_bytes(client: Client, pair: Pair, merged: dict[str, Any]) -> None:
    again = client.wait(client.submit(merged["recipe"], fresh=True)["id"])
    assert again["cached_from"] is None
    assert again["result"]["files"] == merged["result"]["files"]


def test_a_plan_makes_no_job(http: httpx.Client, pair: Pair) -> None:
    before = http.get("/v1/merges", params={"limit": 1}).json()["data"][:1]
    plan = http.post("/v1/merges/plan", json=pair.recipe())
    assert plan.status_code == 200
    assert plan.json()["method"] == "linear"
    assert [model["model"] for model in plan.json()["models"]] == list(pair.models)
    after = http.get("/v1/merges", params={"limit": 1}).json()["data"][:1]
    assert [item["id"] for item in before] == [item["id"] for item in after]


def test_lists_are_paged_and_filtered(client: Client, http: httpx.Client, pair: Pair) -> None:
    ids = [client.submit(pair.recipe())["id"] for _ in range(3)]
    for merge_id in ids:
        client.wait(merge_id)
    found: list[str] = []
    cursor = None
    for _ in range(100):
        query = {"limit": 2, "state": "succeeded", **({"cursor": cursor} if cursor else {})}
        page = http.get("/v1/merges", params=query).json()
        assert {item["state"] for item in page["data"]} <= {"succeeded"}
        found += [item["id"] for item in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(found) == len(set(found))
    assert [merge_id for merge_id in found if merge_id in ids] == ids[::-1]
    assert http.get("/v1/merges", params={"state": "failed", "limit": 200}).json()["data"] == [
        item
        for item in http.get("/v1/merges", params={"limit": 200}).json()["data"]
        if item["state"] == "failed"
    ]


def test_storage_alone_can_tell_about_an_ended_merge(
    up: Up, http: httpx.Client, merged: dict[str, Any]
) -> None:
    with up.redis() as redis:
        assert redis.delete(f"mg:local:merge:{merged['id']}") == 1
    found = http.get(f"/v1/merges/{merged['id']}").json()
    assert found == merged
    record = json.loads((up.storage / "merges" / "local" / f"{merged['id']}.json").read_text())
    assert record["state"] == "succeeded"


def test_a_failing_merge_keeps_its_problem(client: Client, http: httpx.Client, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "nan", seed=1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(folder / "adapter_model.safetensors"))
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    name = push(client, folder, "bad/nan")
    done = client.wait(client.submit({"merge_method": "linear", "models": [{"model": name}]})["id"])
    assert (done["state"], done["result"]) == ("failed", None)
    assert done["error"]["code"] == "non_finite_tensor"
    assert name in done["error"]["detail"]
    assert "scratch" not in json.dumps(done)
    with pytest.raises(InputError) as raised:
        client.download_result(done["id"], tmp_path / "out")
    assert raised.value.code == "non_finite_tensor"
    files = http.get(f"/v1/merges/{done['id']}/files")
    assert (files.status_code, files.json()["code"]) == (409, "merge_not_succeeded")
    assert not (tmp_path / "out").exists()


BAD_RECIPES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"merge_metod": "linear"}, "recipe_unknown_key", "/merge_metod"),
    ({"merge_method": "linearr"}, "unknown_method", "/merge_method"),
    ({"merge_method": 7}, "recipe_invalid_value", "/merge_method"),
    ({"models": []}, "recipe_invalid_value", "/models"),
    ({"models": [{"model": "no/such"}]}, "model_not_found", "/models/0/model"),
    ({"models": [{"model": f"pair/a@{'0' * 40}"}]}, "revision_not_found", "/models/0/model"),
    ({"models": [{"model": "/etc"}]}, "model_reference_invalid", "/models/0/model"),
    ({"models": [{"model": "../../etc"}]}, "model_reference_invalid", "/models/0/model"),
    ({"models": [{"model": "pair/a@main"}]}, "model_reference_invalid", "/models/0/model"),
    ({"models": [{"model": "hf://org/name"}]}, "hub_endpoint_not_allowed", "/models/0/model"),
    ({"models": [{"model": f"merges/mrg_{'0' * 32}"}]}, "model_not_found", "/models/0/model"),
    ({"models": [{"model": "merges/../pair"}]}, "model_reference_invalid", "/models/0/model"),
    ({"parameters": {"densty": 0.5}}, "unknown_parameter", "/parameters/densty"),
    ({"parameters": {"weight": "much"}}, "invalid_parameter", "/parameters/weight"),
    ({"output": {"rank": 0}}, "recipe_invalid_value", "/output/rank"),
    ({"output": {"rank": 4, "energy": 0.5}}, "recipe_invalid_value", "/output"),
    ({"seed": -1}, "recipe_invalid_value", "/seed"),
    ({"merge_method": "core_space", "space": "knots"}, "space_not_supported", "/space"),
    ({"name": ""}, "recipe_invalid_value", "/name"),
]


@pytest.mark.parametrize("path", ["/v1/merges", "/v1/merges/plan"])
@pytest.mark.parametrize(("change", "code", "pointer"), BAD_RECIPES)
def test_bad_recipes_are_refused_at_once(
    http: httpx.Client, pair: Pair, path: str, change: dict[str, Any], code: str, pointer: str | None
) -> None:
    started = time.monotonic()
    answer = http.post(path, json={**pair.recipe(), **change})
    assert time.monotonic() - started < 2
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, code), problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["errors"][0].get("pointer") == pointer
    assert "scratch" not in answer.text


def test_adapters_that_do_not_fit_are_refused_before_a_job(
    client: Client, pair: Pair, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other", seed=1, modules={"layers.0.q_proj": (24, 18)})
    name = push(client, other, "bad/shape")
    with pytest.raises(InputError) as raised:
        client.submit({"merge_method": "linear", "models": [{"model": pair.models[0]}, {"model": name}]})
    assert "layers.0.q_proj" in str(raised.value)
    assert name in str(raised.value)


@pytest.mark.parametrize("what", ["", "/events", "/files", "/report", "/files/report.json"])
def test_unknown_merges_are_404(http: httpx.Client, what: str) -> None:
    answer = http.get(f"/v1/merges/mrg_{'0' * 32}{what}")
    assert (answer.status_code, answer.json()["code"]) == (404, "merge_not_found")
    assert http.get(f"/v1/merges/nonsense{what}").json()["code"] == "request_invalid"


def test_unknown_result_file(http: httpx.Client, merged: dict[str, Any]) -> None:
    answer = http.get(f"{merged['links']['files']}/no.json")
    assert (answer.status_code, answer.json()["code"]) == (404, "file_not_found")


def test_only_the_work_horse_ever_loads_torch(up: Up, merged: dict[str, Any]) -> None:
    assert merged["state"] == "succeeded"
    for pid in (up.process.pid, up.pid_of("workers.process")):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
