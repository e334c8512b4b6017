"""Models over HTTP: upload, commit, read, download, delete."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from adapters import write_adapter

from service.client import Client
from tests.running import Up, push

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", seed=3, rank=5)


def put(http: httpx.Client, model: str, path: str, content: bytes, **headers: str) -> httpx.Response:
    return http.put(f"/v1/models/{model}/files/{path}", content=content, headers=headers)


def test_upload_and_commit_describe_the_adapter(http: httpx.Client, adapter: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        data = (adapter / name).read_bytes()
        stored = put(http, "ns/one", name, data)
        assert stored.status_code == 201
        assert stored.json() == {"path": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    answer = http.post("/v1/models/ns/one/commit")
    assert answer.status_code == 201
    revision = answer.json()
    assert (revision["format"], revision["modules"], revision["rank"]) == ("peft", 4, 5)
    assert revision["base_model"] == "org/base"
    assert len(revision["revision"]) == 40
    assert http.get("/v1/models/ns/one").json() == revision
    assert http.get(f"/v1/models/ns/one/revisions/{revision['revision']}").json() == revision


def test_the_same_content_is_the_same_revision(client: Client, adapter: Path) -> None:
    assert push(client, adapter, "ns/twice") == push(client, adapter, "ns/twice")
    other = write_adapter(adapter.parent / "other", seed=4)
    assert push(client, other, "ns/twice") != push(client, adapter, "ns/twice")


def test_old_revisions_stay_readable(client: Client, http: httpx.Client, tmp_path: Path) -> None:
    first = push(client, write_adapter(tmp_path / "1", seed=1), "ns/history").partition("@")[2]
    second = push(client, write_adapter(tmp_path / "2", seed=2), "ns/history").partition("@")[2]
    listed = http.get("/v1/models/ns/history/revisions").json()["data"]
    assert [item["revision"] for item in listed] == [second, first]
    old = http.get(f"/v1/models/ns/history/files/{WEIGHTS}", params={"revision": first})
    assert old.content == (tmp_path / "1" / WEIGHTS).read_bytes()
    assert (
        http.get(f"/v1/models/ns/history/files/{WEIGHTS}").content == (tmp_path / "2" / WEIGHTS).read_bytes()
    )


def test_pages_list_every_model_once(client: Client, http: httpx.Client, tmp_path: Path) -> None:
    names = {push(client, write_adapter(tmp_path / str(i), seed=i), f"pages/m{i}")[:8] for i in range(5)}
    found: list[str] = []
    cursor = None
    while True:
        query = {"limit": "2", **({"cursor": cursor} if cursor else {})}
        page = http.get("/v1/models", params=query).json()
        assert len(page["data"]) <= 2
        found += [item["model"] for item in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(found) == len(set(found))
    assert names <= set(found)


def test_delete_removes_revision_then_model(client: Client, http: httpx.Client, tmp_path: Path) -> None:
    first = push(client, write_adapter(tmp_path / "1", seed=1), "ns/gone").partition("@")[2]
    second = push(client, write_adapter(tmp_path / "2", seed=2), "ns/gone").partition("@")[2]
    assert http.delete(f"/v1/models/ns/gone/revisions/{second}").status_code == 204
    assert http.get("/v1/models/ns/gone").json()["revision"] == first
    assert http.delete("/v1/models/ns/gone").status_code == 204
    assert http.get("/v1/models/ns/gone").json()["code"] == "model_not_found"
    assert "ns/gone" not in [item["model"] for item in http.get("/v1/models?limit=200").json()["data"]]


def test_pull_gives_back_what_was_pushed(client: Client, adapter: Path, tmp_path: Path) -> None:
    push(client, adapter, "ns/round")
    client.pull("ns/round", tmp_path / "back")
    files = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert files == {name: (adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def test_push_leaves_out_what_a_trainer_left(client: Client, adapter: Path) -> None:
    (adapter / "training_args.bin").write_bytes(b"\x80\x02pickle")
    (adapter / ".cache").mkdir()
    (adapter / ".cache" / "x.json").write_text("{}")
    (adapter / "README.md").write_text("hello")
    files = client.push_dir(adapter, "ns/trainer")["files"]
    assert [entry["path"] for entry in files] == ["README.md", CONFIG, WEIGHTS]


@pytest.fixture(scope="module")
def file(up: Up, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The URL and the content of a file."""
    folder = write_adapter(tmp_path_factory.mktemp("ranges") / "a", seed=9)
    with up.client() as client:
        push(client, folder, "ns/ranges")
    return f"/v1/models/ns/ranges/files/{WEIGHTS}", (folder / WEIGHTS).read_bytes()


class TestDownload:
    """Ranges, validators and checksums."""

    def test_whole_file_with_etag_and_digest(self, http: httpx.Client, file: tuple[str, bytes]) -> None:
        url, data = file
        answer = http.get(url)
        assert answer.content == data
        digest = hashlib.sha256(data)
        assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
        assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        assert answer.headers["x-content-type-options"] == "nosniff"

    def test_head_has_the_headers_only(self, http: httpx.Client, file: tuple[str, bytes]) -> None:
        url, data = file
        answer = http.head(url)
        assert (answer.status_code, answer.content) == (200, b"")
        assert int(answer.headers["content-length"]) == len(data)

    @pytest.mark.parametrize(
        ("header", "start", "end"),
        [
            ("bytes=0-9", 0, 10),
            ("bytes=100-", 100, None),
            ("bytes=-7", -7, None),
            ("bytes=5-99999999", 5, None),
        ],
    )
    def test_ranges(
        self, http: httpx.Client, file: tuple[str, bytes], header: str, start: int, end: int | None
    ) -> None:
        url, data = file
        answer = http.get(url, headers={"Range": header})
        assert answer.status_code == 206
        assert answer.content == data[start:end]
        first = start % len(data)
        assert (
            answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(data)}"
        )

    def test_range_beyond_the_end_is_416(self, http: httpx.Client, file: tuple[str, bytes]) -> None:
        url, data = file
        answer = http.get(url, headers={"Range": f"bytes={len(data)}-"})
        assert answer.status_code == 416
        assert answer.headers["content-range"] == f"bytes */{len(data)}"
        assert answer.json()["code"] == "range_not_satisfiable"

    @pytest.mark.parametrize("header", ["bytes=5-1", "bytes=a-b", "items=0-1", "bytes=0-1,4-5", "bytes=-"])
    def test_other_ranges_mean_the_whole_file(
        self, http: httpx.Client, file: tuple[str, bytes], header: str
    ) -> None:
        url, data = file
        answer = http.get(url, headers={"Range": header})
        assert (answer.status_code, answer.content) == (200, data)

    def test_conditions(self, http: httpx.Client, file: tuple[str, bytes]) -> None:
        url, data = file
        etag = http.head(url).headers["etag"]
        assert http.get(url, headers={"If-None-Match": etag}).status_code == 304
        assert http.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
        part = {"Range": "bytes=0-3"}
        assert http.get(url, headers={**part, "If-Range": etag}).content == data[:4]
        assert http.get(url, headers={**part, "If-Range": '"other"'}).content == data


class TestRefusals:
    """Each bad upload is one problem with a code; nothing of it stays."""

    def blobs(self, up: Up) -> list[Path]:
        return sorted(path for path in up.storage.rglob("*") if path.is_file() and "blobs" in path.parts)

    @pytest.mark.parametrize(
        ("path", "content", "status", "code"),
        [
            ("adapter_model.bin", b"x", 422, "pickle_not_accepted"),
            ("weights.pt", b"x", 422, "pickle_not_accepted"),
            ("a.safetensors", b"PK\x03\x04" + b"x" * 600, 422, "pickle_not_accepted"),
            ("a.safetensors", b"\x80\x04\x95" + b"x" * 100, 422, "pickle_not_accepted"),
            ("a.safetensors", b"\x1f\x8b" + b"x" * 100, 422, "archive_not_accepted"),
            ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", 422, "git_lfs_pointer"),
            ("a.safetensors", b"GGUF" + b"x" * 100, 422, "gguf_not_accepted"),
            ("run.py", b"print()", 422, "file_type_not_accepted"),
            ("%2e%2e/b.json", b"{}", 422, "path_invalid"),
            (".hidden.json", b"{}", 422, "path_invalid"),
            ("a/b/c/d/e/f.json", b"{}", 422, "path_invalid"),
            ("sp%20ace.json", b"{}", 422, "path_invalid"),
            ("nul%00.json", b"{}", 422, "path_invalid"),
        ],
    )
    def test_files(
        self, up: Up, http: httpx.Client, path: str, content: bytes, status: int, code: str
    ) -> None:
        before = self.blobs(up)
        answer = put(http, "ns/bad", path, content)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert answer.headers["content-type"] == "application/problem+json"
        assert self.blobs(up) == before

    @pytest.mark.parametrize(
        ("model", "code"),
        [
            ("-x/y", "name_invalid"),
            ("a..b/y", "name_invalid"),
            ("a/b--c", "name_invalid"),
            ("merges/y", "name_reserved"),
            ("a%2Fb/y", "not_found"),
            ("a/" + "y" * 97, "request_invalid"),
        ],
    )
    def test_names(self, http: httpx.Client, model: str, code: str) -> None:
        answer = put(http, model, "a.json", b"{}")
        assert answer.json()["code"] == code

    def test_wrong_digest(self, up: Up, http: httpx.Client) -> None:
        before = self.blobs(up)
        wrong = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
        answer = put(http, "ns/bad", "a.json", b"{}", **{"Content-Digest": f"sha-256=:{wrong}:"})
        assert (answer.status_code, answer.json()["code"]) == (422, "content_digest_mismatch")
        assert self.blobs(up) == before

    @pytest.mark.parametrize("header", ["sha-256=abc", "sha-256=:abc:", "sha-256=:" + "!" * 44 + ":"])
    def test_malformed_digest(self, http: httpx.Client, header: str) -> None:
        answer = put(http, "ns/bad", "a.json", b"{}", **{"Content-Digest": header})
        assert (answer.status_code, answer.json()["code"]) == (400, "content_digest_invalid")

    def test_content_encoding(self, http: httpx.Client) -> None:
        answer = put(http, "ns/bad", "a.json", b"{}", **{"Content-Encoding": "gzip"})
        assert answer.json()["code"] == "content_encoding_not_accepted"

    def test_too_large_by_its_announced_length(self, http: httpx.Client) -> None:
        answer = put(http, "ns/bad", "a.safetensors", bytes((8 << 20) + 1))
        assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")

    def test_too_large_while_it_streams(self, up: Up, http: httpx.Client) -> None:
        before = self.blobs(up)

        def chunks() -> Iterator[bytes]:
            for _ in range(9):
                yield b"\0" * (1 << 20)

        answer = http.put("/v1/models/ns/bad/files/a.safetensors", content=chunks())
        assert (answer.status_code, answer.json()["code"]) == (413, "file_too_large")
        assert self.blobs(up) == before
        assert not [path for path in (up.storage / "staging").rglob("*") if path.is_file()]

    def test_nothing_to_commit(self, http: httpx.Client) -> None:
        answer = http.post("/v1/models/ns/empty/commit")
        assert (answer.status_code, answer.json()["code"]) == (409, "nothing_to_commit")

    def test_a_refused_commit_keeps_the_files_for_the_next_try(
        self, http: httpx.Client, adapter: Path
    ) -> None:
        put(http, "ns/retry", WEIGHTS, (adapter / WEIGHTS).read_bytes())
        put(http, "ns/retry", CONFIG, b'{"peft_type": "LORA", "r": "many"}')
        answer = http.post("/v1/models/ns/retry/commit")
        assert answer.status_code == 422
        assert CONFIG in answer.text
        assert "scratch" not in answer.text
        put(http, "ns/retry", CONFIG, (adapter / CONFIG).read_bytes())
        assert http.post("/v1/models/ns/retry/commit").status_code == 201

    def test_a_broken_safetensors_file(self, http: httpx.Client, adapter: Path) -> None:
        put(http, "ns/cut", CONFIG, (adapter / CONFIG).read_bytes())
        put(http, "ns/cut", WEIGHTS, (adapter / WEIGHTS).read_bytes()[:-1])
        answer = http.post("/v1/models/ns/cut/commit")
        assert answer.status_code == 422
        assert answer.json()["code"].startswith("safetensors_")

    def test_one_path_cannot_be_file_and_folder(self, http: httpx.Client, adapter: Path) -> None:
        put(http, "ns/nest", "a.json", b"{}")
        put(http, "ns/nest", "a.json/b.json", b"{}")
        assert http.post("/v1/models/ns/nest/commit").json()["code"] == "path_conflict"

    @pytest.mark.parametrize(
        "url", ["/v1/models/no/such", "/v1/models/no/such/revisions", "/v1/models/x..y/z"]
    )
    def test_unknown_model(self, http: httpx.Client, url: str) -> None:
        answer = http.get(url)
        assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")

    def test_unknown_file_and_revision(self, http: httpx.Client, client: Client, adapter: Path) -> None:
        push(client, adapter, "ns/known")
        assert http.get("/v1/models/ns/known/files/no.json").json()["code"] == "file_not_found"
        missing = http.get(f"/v1/models/ns/known/revisions/{'0' * 40}")
        assert (missing.status_code, missing.json()["code"]) == (404, "revision_not_found")
        assert http.get("/v1/models/ns/known/revisions/main").json()["code"] == "request_invalid"
