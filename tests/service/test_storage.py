"""Object storage: the same over a local folder and over a real S3 server."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from merging.errors import InputError
from service.storage import Blob, DigestMismatch, Storage, StreamTooLong, blob_key
from tests.seaweed import Seaweed


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open((tmp_path / "s").as_uri())
    server: Seaweed = request.getfixturevalue("seaweed")
    return server.storage()


async def chunked(*chunks: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if error is not None:
        raise error


def put(storage: Storage, *chunks: bytes, limit: int = 100, **options: object) -> Blob:
    async def run() -> Blob:
        error = options.get("error")
        assert error is None or isinstance(error, Exception)
        expect = options.get("expect")
        assert expect is None or isinstance(expect, str)
        return await storage.put_stream("t", chunked(*chunks, error=error), limit=limit, expect=expect)

    return asyncio.run(run())


def read(storage: Storage, key: str, start: int, end: int) -> bytes:
    async def run() -> bytes:
        return b"".join([chunk async for chunk in storage.stream(key, start, end)])

    return asyncio.run(run())


def test_a_blob_is_named_by_its_content(storage: Storage) -> None:
    blob = put(storage, b"hello ", b"", b"world")
    assert blob == Blob(hashlib.sha256(b"hello world").hexdigest(), 11, new=True)
    key = blob_key("t", blob.sha256)
    assert list(storage.keys("")) == [(key, 11)]
    assert put(storage, b"hello world") == Blob(blob.sha256, 11, new=False)
    assert list(storage.keys("")) == [(key, 11)]
    assert blob_key("other", blob.sha256) != key


@pytest.mark.parametrize(("start", "end"), [(0, 11), (3, 5), (10, 11), (4, 4)])
def test_any_part_can_be_read(storage: Storage, start: int, end: int) -> None:
    key = blob_key("t", put(storage, b"hello world").sha256)
    assert read(storage, key, start, end) == b"hello world"[start:end]


def test_what_goes_wrong_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(StreamTooLong):
        put(storage, b"x" * 60, b"x" * 60)
    with pytest.raises(DigestMismatch) as raised:
        put(storage, b"hello", expect="0" * 64)
    assert raised.value.actual == hashlib.sha256(b"hello").hexdigest()
    with pytest.raises(ConnectionResetError):
        put(storage, b"hello", error=ConnectionResetError())
    assert list(storage.keys("")) == []


def test_the_right_digest_is_accepted(storage: Storage) -> None:
    expect = hashlib.sha256(b"hello").hexdigest()
    assert put(storage, b"hello", expect=expect).sha256 == expect


def test_an_empty_file_is_a_file(storage: Storage) -> None:
    blob = put(storage)
    assert blob.size == 0
    assert storage.size(blob_key("t", blob.sha256)) == 0


def test_documents_are_replaced_as_a_whole(storage: Storage) -> None:
    assert storage.get_json("a/b.json") is None
    storage.put_json("a/b.json", {"x": 1})
    storage.put_json("a/b.json", {"y": [2.5, None]})
    assert storage.get_json("a/b.json") == {"y": [2.5, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.put_json("a/b.json", float("nan"))


def test_a_large_blob_is_whole(storage: Storage) -> None:
    chunks = [bytes([i]) * (1 << 20) for i in range(20)]
    whole = b"".join(chunks)
    blob = put(storage, *chunks, limit=1 << 30)
    assert blob == Blob(hashlib.sha256(whole).hexdigest(), len(whole), new=True)
    key = blob_key("t", blob.sha256)
    assert read(storage, key, (9 << 20) - 3, (17 << 20) + 3) == whole[(9 << 20) - 3 : (17 << 20) + 3]
    assert storage.first_bytes(key, 5) == b"\0" * 5
    assert hashlib.sha256(b"".join(storage.chunks(key))).hexdigest() == blob.sha256
    assert list(storage.keys("staging")) == []


def test_a_large_file_goes_in_and_out(storage: Storage, tmp_path: Path) -> None:
    content = b"".join(bytes([i]) * (1 << 20) for i in range(20))
    (tmp_path / "source").write_bytes(content)
    storage.put_file("m/file", tmp_path / "source")
    storage.fetch("m/file", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content


def test_a_copy_lives_without_its_original(storage: Storage) -> None:
    before = time.time()
    put(storage, b"hello")
    key = blob_key("t", hashlib.sha256(b"hello").hexdigest())
    storage.copy(key, "copies/one")
    storage.delete(key)
    assert storage.get_bytes("copies/one") == b"hello"
    (entry,) = storage.entries("copies")
    assert entry.modified >= int(before)
    with pytest.raises(FileNotFoundError):
        storage.copy(key, "copies/two")


def test_a_missing_object_shows_before_anything_is_sent(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.stream("none", 0, 1)


def test_folders_are_listed_one_level_deep(storage: Storage) -> None:
    for key in ("p/b/1", "p/a/1/x", "p/a/2", "p/file", "q/c/1"):
        storage.put_json(key, 1)
    assert storage.folders("p") == ["a", "b"]
    assert storage.folders("none") == []


def test_the_storage_is_there(storage: Storage) -> None:
    storage.check()
    storage.require()


def test_files_go_in_and_out(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    storage.put_file("m/1/file", source)
    source.unlink()
    storage.fetch("m/1/file", tmp_path / "deep" / "er" / "target")
    assert (tmp_path / "deep" / "er" / "target").read_bytes() == b"content"
    with pytest.raises(FileNotFoundError):
        storage.fetch("m/1/none", tmp_path / "none")


def test_prefixes_are_removed(storage: Storage) -> None:
    for key in ("p/1/a", "p/1/b/c", "p/10/a"):
        storage.put_json(key, 1)
    storage.delete_prefix("p/1")
    assert [key for key, _ in storage.keys("p")] == ["p/10/a"]
    storage.delete("p/absent")


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://h/x", "file://host/x", "/plain/path", "file://", "s3:/x", "s3://", "s3://UPPER/x"),
        *("s3://b", "s3://key:hunter2@bucket/x", "s3://bucket/a/../b", "s3://bucket/a//b", "s3://bucket#x"),
        *("s3://bucket?secret=hunter2", "s3://bucket?endpoint=ftp://h", "s3://bucket?endpoint=http://u:p@h"),
    ],
)
def test_other_places_are_refused(url: str) -> None:
    with pytest.raises(InputError) as raised:
        Storage.open(url)
    assert raised.value.code == "storage_url_unsupported"
    assert "hunter2" not in str(raised.value)
