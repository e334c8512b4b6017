"""Unmodified Hub clients write to the service as to their Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapters import write_adapter

from tests.running import Up
from tests.service.hub_client import python

WRITE = """
import json, pathlib, sys
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
folder, other, repo = sys.argv[1:]
api = HfApi()

def refused(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None

found = {"url": api.create_repo(repo).repo_id}
found["again"] = [refused(api.create_repo, repo)[0], api.create_repo(repo, exist_ok=True).repo_id]
found["empty"] = [api.model_info(repo).sha, api.list_repo_files(repo), api.repo_exists(repo)]
first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="first")
found["first"] = [first.oid, api.model_info(repo).sha, sorted(api.list_repo_files(repo))]
found["url"] = str(first.commit_url)
same = api.upload_folder(repo_id=repo, folder_path=folder)
found["unchanged"] = same.oid
text = b"---\\nlicense: mit\\n---\\n# hello\\n"
card = api.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id=repo)
found["card"] = [card.oid, sorted(api.list_repo_files(repo))]
if int(huggingface_hub.__version__.split(".")[0]) >= 2:  # before, it asked the public Hub whatever was set
    ModelCard.load(repo).push_to_hub(repo)
found["yaml"] = refused(
    api.upload_file, path_or_fileobj=b"---\\na: [\\n---\\n", path_in_repo="README.md", repo_id=repo)
gone = api.delete_file("README.md", repo)
found["deleted"] = gone.oid
found["missing"] = refused(api.delete_file, "README.md", repo)
weights = pathlib.Path(other, "adapter_model.safetensors")
found["stale"] = refused(
    api.create_commit, repo, [CommitOperationAdd("adapter_model.safetensors", str(weights))],
    commit_message="stale", parent_commit=card.oid)
found["fresh"] = api.create_commit(
    repo, [CommitOperationAdd("adapter_model.safetensors", str(weights))],
    commit_message="fresh", parent_commit=gone.oid).oid
found["broken"] = refused(
    api.create_commit, repo, [CommitOperationDelete("adapter_config.json")], commit_message="no")
found["pickle"] = refused(
    api.upload_file, path_or_fileobj=b"\\x80\\x02}", path_in_repo="adapter_model.bin", repo_id=repo)
found["branch"] = refused(api.create_branch, repo, branch="dev")
found["pr"] = refused(
    api.upload_file, path_or_fileobj=b"{}", path_in_repo="a.json", repo_id=repo, create_pr=True)
found["result"] = refused(api.create_repo, "merges/mine")
api.upload_file(path_or_fileobj=b"x", path_in_repo=".gitattributes", repo_id=repo)
found["after"] = [api.model_info(repo).sha, sorted(api.list_repo_files(repo))]
api.delete_repo(repo)
found["exists"] = api.repo_exists(repo)
found["no repo"] = refused(api.upload_folder, repo_id=repo, folder_path=folder)
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("hub-write")
    return write_adapter(root / "a", seed=31), write_adapter(root / "b", seed=32)


def test_huggingface_hub_writes(up: Up, folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = python(up, tmp_path, WRITE, *map(str, folders), "hub/written")
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert found["again"] == ["HfHubHTTPError", "hub/written"]
    assert found["empty"] == [hashlib.sha256(b"[]").hexdigest()[:40], [], True]
    first = found["first"][0]
    assert found["first"] == [first, first, adapter]
    assert found["url"] == f"{up.url}/hf/hub/written/commit/{first}"
    assert found["unchanged"] == first
    assert found["card"][0] != first
    assert found["card"][1] == ["README.md", *adapter]
    assert found["deleted"] == first, "the same files are the same commit"
    assert found["fresh"] not in (first, found["card"][0])
    assert found["after"] == [found["fresh"], adapter]
    assert found["exists"] is False


@pytest.mark.parametrize(
    ("attempt", "kind", "told"),
    [
        ("yaml", "ValueError", "the front matter is not YAML"),
        ("missing", "RemoteEntryNotFoundError", "A file with this name doesn't exist: README.md"),
        ("stale", "HfHubHTTPError", "parent_commit_outdated: A commit has happened since"),
        ("broken", "HfHubHTTPError", "refused has no adapter_config.json. It states"),
        ("pickle", "HfHubHTTPError", "pickle_not_accepted: adapter_model.bin has the suffix of a pickle"),
        ("branch", "HfHubHTTPError", "not_supported: this service has no branches"),
        ("pr", "HfHubHTTPError", "not_supported: this service has no pull requests"),
        ("result", "HfHubHTTPError", "name_reserved: the namespace 'merges' is reserved"),
        ("no repo", "RepositoryNotFoundError", "there is no model hub/refused"),
    ],
)
def test_what_the_client_says_of_a_refusal(refusals: Any, attempt: str, kind: str, told: str) -> None:
    name, message = refusals[attempt]
    assert name == kind
    assert told in message


@pytest.fixture(scope="module")
def refusals(up: Up, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return python(up, tmp_path_factory.mktemp("refused"), WRITE, *map(str, folders), "hub/refused")


PUSH = """
import json, sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models
from huggingface_hub import HfApi

repo = sys.argv[1]
config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=2, vocab_size=32)

torch.manual_seed(0)
LlamaForCausalLM(config).save_pretrained("base")

def base():
    return AutoModelForCausalLM.from_pretrained("base").eval()

def tuned():
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base(), lora).eval()

torch.manual_seed(1)
model = tuned()
x = torch.arange(10).reshape(2, 5)
words = models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
found = {"tokenizer": tokenizer.push_to_hub(repo).oid, "push": model.push_to_hub(repo).oid}
found["files"] = sorted(HfApi().list_repo_files(repo))
with torch.no_grad():
    wanted = model(x).logits
    again = PeftModel.from_pretrained(base(), repo)(x).logits
    loaded = base()
    loaded.load_adapter(repo)
    by_transformers = loaded(x).logits
    by_name = AutoModelForCausalLM.from_pretrained(repo).eval()(x).logits
    loaded.push_to_hub(repo + "-2")
    second = PeftModel.from_pretrained(base(), repo + "-2")(x).logits
    plain = base()(x).logits
all_of_them = (again, by_transformers, by_name, second)
found["differences"] = [float((logits - wanted).abs().max()) for logits in all_of_them]
found["effect"] = float((plain - wanted).abs().max())
print(json.dumps(found))
"""


def test_peft_and_transformers_push_and_load(up: Up, tmp_path: Path) -> None:
    found = python(up, tmp_path, PUSH, "hub/pushed")
    assert found["differences"] == [0.0, 0.0, 0.0, 0.0]
    assert found["effect"] > 0.001
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(
        found["files"]
    )
    revision = up.http.get("/v1/models/hub/pushed").json()
    assert (revision["revision"], revision["format"], revision["rank"]) == (found["push"], "peft", 4)
    first = up.http.get(f"/v1/models/hub/pushed/revisions/{found['tokenizer']}").json()
    assert (first["format"], first["modules"]) == ("none", 0)


def made(http: httpx.Client, model: str) -> str:
    ns, name = model.split("/")
    assert http.post("/hf/api/repos/create", json={"name": name, "organization": ns}).status_code == 200
    return f"/hf/api/models/{model}"


def body(*lines: tuple[str, dict[str, Any]]) -> bytes:
    return b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in lines)


def added(path: str, content: bytes) -> tuple[str, dict[str, Any]]:
    return "file", {"content": base64.b64encode(content).decode(), "path": path, "encoding": "base64"}


def adapter(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    return [added(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


def test_weights_are_merged_only_where_there_are_some(http: httpx.Client, folders: tuple[Path, Path]) -> None:
    at = made(http, "hub/card-only")
    http.post(f"{at}/commit/main", content=body(added("README.md", b"# later")))
    recipe = {"merge_method": "linear", "models": [{"model": "hub/card-only"}]}
    refused = http.post("/v1/merges", json=recipe)
    assert (refused.status_code, refused.json()["code"]) == (422, "model_has_no_weights")
    done = http.post(f"{at}/commit/main", content=body(*adapter(folders[0])))
    assert done.status_code == 200
    assert [item["path"] for item in http.get(f"{at}/tree/main").json()] == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert http.post("/v1/merges/plan", json=recipe).status_code == 200


def test_a_refused_commit_changes_nothing(http: httpx.Client, folders: tuple[Path, Path]) -> None:
    at = made(http, "hub/atomic")
    before = http.get(at).json()
    config = folders[0] / "adapter_config.json"
    weights, lfs = "adapter_model.safetensors", {"path": "a.safetensors", "oid": "0" * 64}
    for lines, code in (
        ([added(weights, (folders[0] / weights).read_bytes())], "adapter_config_missing"),
        ([added(config.name, config.read_bytes()), added(weights, bytes(64))], None),
        ([added("a.bin", b"x")], "pickle_not_accepted"),
        ([added("../up.md", b"x")], "path_invalid"),
        ([added("notes.md/a.md", b"x")], "path_conflict"),
        ([added("a.json", b"PK\x03\x04" + bytes(600))], "pickle_not_accepted"),
        ([("lfsFile", lfs)], "content_not_uploaded"),
        ([("lfsFile", {**lfs, "oid": "../x"})], "commit_malformed"),
        ([("renameFile", {"path": "a"})], "commit_malformed"),
        ([("deletedFolder", {"path": "none"})], "file_not_found"),
    ):
        answer = http.post(f"{at}/commit/main", content=body(added("notes.md", b"x"), *lines))
        assert answer.status_code in (400, 404, 409, 422)
        assert code in (None, answer.json()["code"])
        assert http.get(at).json() == before


def test_commits_at_the_same_time_lose_nothing(up: Up, http: httpx.Client) -> None:
    at = made(http, "hub/busy")

    def commit(number: int) -> str:
        with httpx.Client(base_url=up.url, timeout=30, trust_env=False) as own:
            answer = own.post(f"{at}/commit/main", content=body(added(f"{number}.json", b"%d" % number)))
        return str(answer.json()["commitOid"])

    with ThreadPoolExecutor(8) as pool:
        commits = list(pool.map(commit, range(12)))
    assert len(set(commits)) == 12, "each is a revision of its own"
    assert len(http.get(f"{at}/tree/main").json()) == 12
    listed = http.get("/v1/models/hub/busy/revisions").json()["data"]
    counts = [len(item["files"]) for item in listed]
    assert counts == sorted(counts, reverse=True) == list(range(12, -1, -1))


def test_of_commits_for_one_parent_one_wins(up: Up, http: httpx.Client) -> None:
    at = made(http, "hub/race")
    parent = http.get(at).json()["sha"]

    def commit(number: int) -> int:
        with httpx.Client(base_url=up.url, timeout=30, trust_env=False) as own:
            header = ("header", {"summary": "s", "parentCommit": parent})
            lines = body(header, added("a.json", b"%d" % number))
            return own.post(f"{at}/commit/main", content=lines).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(commit, range(8))) == [200, *[412] * 7]


def test_an_old_commit_that_comes_back_is_the_newest(http: httpx.Client) -> None:
    at = made(http, "hub/back")
    first = http.post(f"{at}/commit/main", content=body(added("a.json", b"1"))).json()["commitOid"]
    http.post(f"{at}/commit/main", content=body(added("a.json", b"2")))
    assert http.post(f"{at}/commit/main", content=body(added("a.json", b"1"))).json()["commitOid"] == first
    assert http.get(at).json()["sha"] == first
    dates = [item["created_at"] for item in http.get("/v1/models/hub/back/revisions").json()["data"]]
    assert dates == sorted(dates, reverse=True)


def test_folders_and_commits_by_name(http: httpx.Client) -> None:
    at = made(http, "hub/folders")
    lines = body(added("a/x.json", b"1"), added("a/y/z.json", b"2"), added("b.json", b"3"))
    newest = http.post(f"{at}/commit/main", content=lines).json()["commitOid"]
    gone = http.post(f"{at}/commit/{newest}", content=body(("deletedFolder", {"path": "a/"})))
    assert [item["path"] for item in http.get(f"{at}/tree/main").json()] == ["b.json"]
    old = http.post(f"{at}/commit/{newest}", content=body(added("c.json", b"1")))
    assert (old.status_code, old.headers["x-error-code"]) == (404, "RevisionNotFound")
    nothing = http.post(f"{at}/commit/main", content=body(("header", {"summary": "nothing"})))
    assert nothing.json()["commitOid"] == gone.json()["commitOid"]


def test_how_files_are_to_be_sent(http: httpx.Client) -> None:
    at = made(http, "hub/advice")
    http.post(f"{at}/commit/main", content=body(added("a.json", b"one")))

    def ask(agent: str, *files: tuple[str, int]) -> list[dict[str, Any]]:
        asked = [{"path": path, "size": size, "sample": ""} for path, size in files]
        answer = http.post(f"{at}/preupload/main", json={"files": asked}, headers={"User-Agent": agent})
        return answer.json()["files"]

    known, other = ask("x; hf_hub/2.4.0", ("a.json", 3), ("b.json", 3))
    assert known["oid"] == hashlib.sha1(b"blob 3\0one").hexdigest()
    assert other["oid"] is None
    names = (".gitattributes", "runs/.x", "training_args.bin", "checkpoint/optimizer.pt")
    assert [item["shouldIgnore"] for item in ask("", *((name, 3) for name in names))] == [True] * 4
    large = ("adapter_model.safetensors", 6 << 20)
    assert [ask(f"x; hf_hub/{v}", large)[0]["uploadMode"] for v in ("2.4.0", "1.0.0", "0.36.2")] == [
        "regular", "regular", "lfs",
    ]  # fmt: skip
    too_large = http.post(
        f"{at}/preupload/main", json={"files": [{"path": "a.safetensors", "size": 1 << 40}]}
    )
    assert (too_large.status_code, too_large.json()["code"]) == (413, "file_too_large")


def announced(http: httpx.Client, path: str, size: int) -> int:
    """The answer to a request of which only the head is sent."""
    with closing(HTTPConnection(http.base_url.host, http.base_url.port or 80, timeout=10)) as connection:
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        return connection.getresponse().status


def test_a_commit_may_be_larger_than_a_document(http: httpx.Client) -> None:
    at = made(http, "hub/large")
    content = json.dumps({"text": "x" * (3 << 20)}).encode()
    answer = http.post(f"{at}/commit/main", content=body(added("large.json", content)))
    assert answer.status_code == 200
    assert http.get("/hf/hub/large/resolve/main/large.json").content == content
    assert announced(http, f"{at}/commit/main", 2 << 30) == 413
    assert announced(http, f"{at}/preupload/main", 3 << 20) == 413


def test_only_what_is_supported_is_made(http: httpx.Client) -> None:
    for named, code in (
        ({"name": "x", "organization": "a", "type": "dataset"}, "repo_type_not_supported"),
        ({"name": "x y", "organization": "a"}, "name_invalid"),
        ({"organization": "a"}, "name_invalid"),
    ):
        answer = http.post("/hf/api/repos/create", json=named)
        assert (answer.status_code, answer.json()["code"]) == (422, code)
        assert code in answer.headers["x-error-message"]
    mine = http.post("/hf/api/repos/create", json={"name": "short"})
    assert mine.json()["name"] == "local/short", "the tenant is the user"
    assert re.fullmatch(r"http://[^/]+/hf/local/short", mine.json()["url"])


def test_a_result_cannot_be_changed(http: httpx.Client, merged: dict[str, Any]) -> None:
    at = f"/hf/api/models/merges/{merged['id']}"
    answer = http.post(f"{at}/commit/main", content=body(added("a.json", b"1")))
    assert (answer.status_code, answer.json()["code"]) == (403, "result_read_only")
    gone = http.request(
        "DELETE", "/hf/api/repos/delete", json={"name": merged["id"], "organization": "merges"}
    )
    assert gone.json()["code"] == "result_read_only"
