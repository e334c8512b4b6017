"""Two services on this machine: one imports from the other and pushes its results there."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapters import write_adapter

from benchmarks.checkpoint_inputs import Shape, write_checkpoints
from tests.running import Up, push, until

CLOSED = "http://127.0.0.1:9/hf"


@pytest.fixture(scope="module")
def near(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A service whose first hub is another one, and whose second one is not there."""
    data = tmp_path_factory.mktemp("near")
    running = Up(
        data,
        hf_endpoints=f"{up.url}/hf,{CLOSED}",
        hf_token="hf_neverShown",
        max_upload_bytes=str(1 << 20),
    )
    yield running
    assert "hf_neverShown" not in running.log()
    assert running.stop() == 0, running.log()


@pytest.fixture(scope="module")
def far(up: Up, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters in the other hub, as `far/a` and `far/b`."""
    root = tmp_path_factory.mktemp("far")
    folders = write_adapter(root / "a", seed=51), write_adapter(root / "b", seed=52)
    with up.client() as client:
        push(client, folders[0], "far/a")
        push(client, folders[1], "far/b")
    return folders


def merge(near: Up, *models: str, **more: Any) -> dict[str, Any]:
    """Request a merge and wait for its end."""
    recipe = {"merge_method": "linear", "models": [{"model": model} for model in models]}
    answer = near.http.post("/v1/merges", json={**recipe, **more})
    assert answer.status_code in (200, 202), answer.text
    with near.client() as client:
        return client.wait(answer.json()["id"])


def commit_of(up: Up, model: str) -> str:
    return str(up.http.get(f"/v1/models/{model}").json()["revision"])


def pushed(near: Up, merge_id: str) -> dict[str, Any]:
    """The end of a push."""

    def ended() -> Any:
        found = near.http.get(f"/v1/merges/{merge_id}").json()["push"]
        return found if found["state"] in ("succeeded", "failed") else None

    found: dict[str, Any] = until(ended, what="the push has ended")
    return found


@pytest.fixture(scope="module")
def imported(near: Up, far: tuple[Path, Path]) -> dict[str, Any]:
    """A merge of one model of the other hub."""
    done = merge(near, "hf://far/a")
    assert done["state"] == "succeeded", done
    return done


def test_models_of_another_hub_are_merged(near: Up, up: Up, far: tuple[Path, Path]) -> None:
    with near.client() as client:
        here = push(client, far[1], "near/b")
    done = merge(near, "hf://far/a", here)
    assert done["state"] == "succeeded", done
    commit = commit_of(up, "far/a")
    assert done["result"]["imports"] == {"hf://far/a": commit}
    report = near.http.get(f"/v1/merges/{done['id']}/report").json()
    assert sorted(entry["model"] for entry in report["inputs"]) == [f"hf://far/a@{commit}", here]
    with near.client() as client:
        same = client.wait(client.submit({
            "merge_method": "linear", "models": [{"model": push(client, far[0], "near/a")}, {"model": here}],
        })["id"])  # fmt: skip
    weights = "/v1/merges/{}/files/adapter_model.safetensors"
    assert (
        near.http.get(weights.format(done["id"])).content[-400:]
        == (near.http.get(weights.format(same["id"])).content[-400:])
    )


def test_a_whole_model_comes_with_its_tokenizer(near: Up, up: Up, tmp_path: Path) -> None:
    shape = Shape(hidden=8, inner=8, heads=2, kv_heads=1, layers=1, vocab=16)
    folders = write_checkpoints(tmp_path, shape, dtype="float32")[:2]
    (folders[0] / "tokenizer.model").write_bytes(b"\n pieces")
    (folders[0] / "merges.txt").write_text("a b\n")
    with up.client() as client:
        for folder in folders:
            push(client, folder, f"far/whole-{folder.name}")
    names = [f"hf://far/whole-{folder.name}" for folder in folders]
    done = merge(near, names[1], base_model=names[0], output={"format": "checkpoint"})
    assert done["state"] == "succeeded", done
    files = {item["path"] for item in done["result"]["files"]}
    assert {"tokenizer.model", "merges.txt", "tokenizer.json"} <= files


def test_a_branch_that_moves_is_looked_up_each_time(near: Up, up: Up, tmp_path: Path) -> None:
    with up.client() as client:
        old = push(client, write_adapter(tmp_path / "1", seed=61), "far/moving").partition("@")[2]
        before = merge(near, "hf://far/moving")
        new = push(client, write_adapter(tmp_path / "2", seed=62), "far/moving").partition("@")[2]
    after = merge(near, "hf://far/moving")
    host = up.url.partition("://")[2]
    pinned = merge(near, f"hf://{host}/hf/far/moving@{old}")
    assert after["cached_from"] is None
    assert [m["result"]["imports"].popitem()[1] for m in (before, after, pinned)] == [old, new, old]
    digests = [m["result"]["recipe_digest"] for m in (before, after, pinned)]
    assert digests[0] == digests[2] != digests[1]


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("hf://huggingface.co/far/a", "hub_endpoint_not_allowed"),
        ("hf://127.0.0.1/far/a", "hub_endpoint_not_allowed"),
        ("hf://far", "hub_reference_invalid"),
        ("hf://far/a@", "hub_reference_invalid"),
        ("hf://far/a@../../x", "hub_reference_invalid"),
        ("hf://../a", "hub_reference_invalid"),
        ("hf://user:pw@far/a", "hub_reference_invalid"),
    ],
)
def test_no_request_leaves_the_listed_hubs(near: Up, model: str, code: str) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": model}]}
    answer = near.http.post("/v1/merges", json=recipe)
    assert (answer.status_code, answer.json()["code"]) == (422, code)


def test_a_plan_reads_no_other_hub(near: Up) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "hf://far/a"}]}
    answer = near.http.post("/v1/merges/plan", json=recipe)
    assert (answer.status_code, answer.json()["code"]) == (422, "hub_model_not_here")


def test_what_cannot_be_imported_fails_the_merge(
    near: Up, up: Up, far: tuple[Path, Path], tmp_path: Path
) -> None:
    with up.client() as client:
        wide = write_adapter(tmp_path / "wide", seed=1, modules={"layers.0.q_proj": (4096, 4096)}, rank=64)
        push(client, wide, "far/large")
    up.http.post("/hf/api/repos/create", json={"name": "empty", "organization": "far"})
    for model, code in (
        ("hf://far/none", "hub_not_found"),
        (f"hf://far/a@{'0' * 40}", "hub_not_found"),
        ("hf://far/large", "hub_too_large"),
        ("hf://far/empty", "hub_no_model"),
        ("hf://127.0.0.1:9/hf/far/a", "hub_unreachable"),
    ):
        done = merge(near, model)
        assert (done["state"], done["error"]["code"]) == ("failed", code), done


def test_a_result_is_pushed(near: Up, up: Up, far: tuple[Path, Path]) -> None:
    done = merge(near, "hf://far/a", "hf://far/b", push_to={"repo": "pushed/linear"})
    push = pushed(near, done["id"])
    assert (push["state"], push["error"]) == ("succeeded", None), push
    assert push["commit"] == commit_of(up, "pushed/linear")
    files = {item["path"]: item["sha256"] for item in done["result"]["files"]}
    there = up.http.get("/v1/models/pushed/linear").json()
    assert {item["path"]: item["sha256"] for item in there["files"]} == files
    again = near.http.post(f"/v1/merges/{done['id']}/push")
    assert again.status_code == 202
    assert pushed(near, done["id"])["commit"] == push["commit"], "the same content is the same commit"
    other = near.http.post(f"/v1/merges/{done['id']}/push", json={"repo": "pushed/second"})
    assert other.json()["push"]["repo"] == "pushed/second"
    assert pushed(near, done["id"])["state"] == "succeeded"
    assert commit_of(up, "pushed/second") == push["commit"]


def test_a_result_that_was_there_is_pushed_too(near: Up, up: Up, far: tuple[Path, Path]) -> None:
    with near.client() as client:
        here = push(client, far[0], "near/cached")
    until(lambda: merge(near, here)["cached_from"], what="the result is known")
    done = merge(near, here, push_to={"repo": "pushed/cached"})
    assert done["cached_from"] is not None
    assert pushed(near, done["id"])["state"] == "succeeded"
    assert commit_of(up, "pushed/cached")


def test_all_parts_of_a_result_are_pushed(near: Up, up: Up, far: tuple[Path, Path]) -> None:
    done = merge(near, "hf://far/a", "hf://far/b", merge_method="rmm", push_to={"repo": "pushed/parts"})
    assert pushed(near, done["id"])["error"] is None
    there = up.http.get("/v1/models/pushed/parts").json()
    files = {item["path"]: item["sha256"] for item in done["result"]["files"]}
    assert {item["path"]: item["sha256"] for item in there["files"]} == files
    assert (there["format"], there["rank"] > 0) == ("parts", True)
    info = up.http.get("/hf/api/models/pushed/parts").json()
    assert (info["library_name"], info["tags"]) == (
        "peft",
        ["peft", "safetensors", "lora", "base_model:org/base"],
    )
    recipe = {"merge_method": "linear", "models": [{"model": "pushed/parts"}]}
    assert up.http.post("/v1/merges/plan", json=recipe).json()["code"] == "several_adapters"


def test_a_push_that_fails_leaves_the_result(near: Up, up: Up, imported: dict[str, Any]) -> None:
    done = imported
    unasked = near.http.post(f"/v1/merges/{done['id']}/push")
    assert (unasked.status_code, unasked.json()["code"]) == (409, "push_not_requested")
    near.http.post(f"/v1/merges/{done['id']}/push", json={"repo": "merges/taken"})
    push = pushed(near, done["id"])
    assert (push["state"], push["error"]["code"]) == ("failed", "hub_refused")
    assert "name_reserved" in push["error"]["detail"]
    assert near.http.get(f"/v1/merges/{done['id']}/report").status_code == 200
    away = {"repo": "pushed/away", "endpoint": CLOSED}
    near.http.post(f"/v1/merges/{done['id']}/push", json=away)
    assert pushed(near, done["id"])["error"]["code"] == "hub_unreachable"
    near.http.post(f"/v1/merges/{done['id']}/push", json={"repo": "pushed/late"})
    assert pushed(near, done["id"])["commit"] == commit_of(up, "pushed/late")
    record = near.storage / "merges" / "local" / f"{done['id']}.json"
    kept = until(
        lambda: json.loads(record.read_text())["push"]["state"] == "succeeded", what="it is in storage"
    )
    assert kept


def test_where_nothing_can_be_pushed(near: Up, imported: dict[str, Any]) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "hf://far/a"}]}
    for target, code in (
        ({"repo": "a/b", "endpoint": "https://huggingface.co"}, "hub_endpoint_not_allowed"),
        ({"repo": "nonsense"}, "hub_reference_invalid"),
        ({"repo": "a/b", "revision": "../x"}, "hub_reference_invalid"),
        ({"repo": "a/b", "token": "x"}, "recipe_unknown_key"),
    ):
        answer = near.http.post("/v1/merges", json={**recipe, "push_to": target})
        assert (answer.status_code, answer.json()["code"]) == (422, code)
    answer = near.http.post(f"/v1/merges/mrg_{'0' * 32}/push", json={"repo": "a/b"})
    assert (answer.status_code, answer.json()["code"]) == (404, "merge_not_found")


def test_a_push_goes_on_when_its_process_is_killed(far: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes the connection, and never answers
        port = deaf.getsockname()[1]
        own = Up(tmp_path / "own", hf_endpoints=f"http://127.0.0.1:{port}/hf")
        try:
            with own.client() as client:
                model = push(client, far[0], "own/a")
            done = merge(own, model, push_to={"repo": "pushed/killed"})
            until(lambda: own.http.get(f"/v1/merges/{done['id']}").json()["push"]["state"] == "running",
                  what="the push runs")  # fmt: skip
            busy = own.http.post(f"/v1/merges/{done['id']}/push")
            assert (busy.status_code, busy.json()["code"]) == (409, "push_in_progress")
            deaf.settimeout(30)
            first, _ = deaf.accept()
            os.kill(own.horse(), signal.SIGKILL)
            again, _ = deaf.accept()
            again.close()
            first.close()
            deaf.close()
            ended = pushed(own, done["id"])
            assert (ended["state"], ended["error"]["code"]) == ("failed", "hub_unreachable")
            assert own.http.get(f"/v1/merges/{done['id']}").json()["state"] == "succeeded"
        finally:
            assert own.stop() == 0, own.log()
