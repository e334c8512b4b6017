"""What only a bucket has: others may refuse us, be away for a while, or be asked by a signed URL."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from merging.errors import InputError
from service.addresses import with_parameters
from service.errors import Unavailable
from service.storage import Storage, StorageRefused, StorageUnavailable, files, stores
from tests.seaweed import BUCKET, OWNER, READER, REGION, Seaweed

STEPS: dict[str, Callable[[Storage], object]] = {
    "read": lambda storage: storage.get_bytes("a"),
    "look": lambda storage: storage.size("a"),
    "list": lambda storage: storage.entries("a"),
    "write": lambda storage: storage.put_json("a", 1),
    "copy": lambda storage: storage.copy("a", "b"),
    "remove": lambda storage: storage.delete("a", "b"),
    "stream in": lambda storage: asyncio.run(storage.put_stream("t", _some(), limit=9)),
    "stream out": lambda storage: storage.stream("a", 0, 1),
    "ask": lambda storage: storage.check(),
}


async def _some() -> AsyncIterator[bytes]:
    yield b"some"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A server that these tests may stop."""
    server = Seaweed(tmp_path_factory.mktemp("own"))
    yield server
    server.close()


def test_more_than_a_page_of_objects_is_listed_and_removed(seaweed: Seaweed) -> None:
    storage = seaweed.storage()
    keys = [f"many/{i:04d}" for i in range(1100)]
    for key in keys:
        storage.put_json(key, 0)
    assert [key for key, _ in storage.keys("many")] == keys
    storage.delete_prefix("many")
    assert list(storage.keys("many")) == []


def test_what_the_bucket_does_not_copy_by_itself_is_streamed(
    seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storage = seaweed.storage()
    content = bytes(range(256)) * (80 << 10)
    (tmp_path / "file").write_bytes(content)
    storage.put_file("large", tmp_path / "file")
    monkeypatch.setattr(files, "_COPY_LIMIT", len(content) - 1)
    monkeypatch.setattr("obstore.copy", None)
    storage.copy("large", "copies/large")
    assert b"".join(storage.chunks("copies/large")) == content

    def broken(self: Storage, key: str) -> Iterator[bytes]:
        yield content[: 10 << 20]
        raise StorageUnavailable("storage_unavailable", "away")

    monkeypatch.setattr(Storage, "chunks", broken)
    with pytest.raises(StorageUnavailable):
        storage.copy("large", "copies/half")
    assert storage.size("copies/half") is None


def test_a_bucket_that_is_not_there_is_named_as_the_trouble(seaweed: Seaweed) -> None:
    storage = seaweed.storage(bucket="no-such-bucket")
    for name in ("list", "write", "ask", "stream in", "read"):
        with pytest.raises(StorageRefused) as raised:
            STEPS[name](storage)
        assert raised.value.code == "storage_bucket_missing"
    with pytest.raises(InputError) as refused:
        storage.require()
    assert refused.value.code == "storage_bucket_missing"
    assert refused.value.where == {"field": "MERGANSER_STORAGE_URL"}


@pytest.mark.parametrize("step", [name for name in STEPS if name != "remove"])
def test_wrong_credentials_are_named_as_the_trouble(
    seaweed: Seaweed, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = seaweed.storage((OWNER[0], "not-the-secret"))
    with caplog.at_level(logging.DEBUG), pytest.raises(StorageRefused) as raised:
        STEPS[step](storage)
    assert raised.value.code == "storage_denied"
    for text in (str(raised.value), str(raised.value.remedy), caplog.text):
        assert OWNER[0] not in text
        assert "not-the-secret" not in text


def test_who_may_only_read_is_told_so_when_writing(seaweed: Seaweed) -> None:
    storage = seaweed.storage(READER)
    storage.require()
    assert storage.get_bytes("a") is None
    with pytest.raises(StorageRefused) as raised:
        storage.put_json("a", 1)
    assert raised.value.code == "storage_denied"


def test_a_server_that_is_away_is_given_up_soon(own: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stores.RETRY_SECONDS + stores.CONNECT_SECONDS < 10
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.3)
    storage = own.storage()
    storage.put_json("a", 1)
    own.kill()
    try:
        for step in STEPS.values():
            began = time.monotonic()
            with pytest.raises(StorageUnavailable) as raised:
                step(storage)
            assert time.monotonic() - began < 5
            assert raised.value.code == "storage_unavailable"
            assert isinstance(raised.value, Unavailable)
            assert "127.0.0.1" not in str(raised.value)
    finally:
        own.start()


def test_a_server_that_stands_still_is_given_up(own: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "READ_SECONDS", 1)
    monkeypatch.setattr(stores, "RETRY_SECONDS", 1)
    storage = own.storage()
    own.freeze()
    try:
        with pytest.raises(StorageUnavailable):
            storage.size("a")
        storage.require()  # it may come back, so this is no reason not to start
    finally:
        own.thaw()


def test_the_patient_wait_for_the_server(
    own: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.3)
    storage = own.storage(patient=True)
    content = bytes(range(256)) * (48 << 10)
    (tmp_path / "file").write_bytes(content)
    own.kill()
    back = threading.Timer(2, own.start)
    back.start()
    began = time.monotonic()
    storage.put_file("a/file", tmp_path / "file")
    assert time.monotonic() - began > 2
    back.join()
    storage.fetch("a/file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


LARGE = 48 << 20


def test_a_download_goes_on_after_an_interruption(
    own: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 60)  # the server takes its time to come back
    storage = own.storage()
    content = b"".join(hashlib.sha256(bytes([i])).digest() * (1 << 15) for i in range(LARGE >> 20))
    (tmp_path / "file").write_bytes(content)
    storage.put_file("file", tmp_path / "file")
    chunks = storage.chunks("file")
    found = next(chunks)
    own.kill()
    back = threading.Timer(0.5, own.start)
    back.start()
    assert hashlib.sha256(found + b"".join(chunks)).digest() == hashlib.sha256(content).digest()
    back.join()


def test_a_download_that_breaks_off_for_good_says_so(
    own: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "RETRY_SECONDS", 0.3)
    storage = own.storage()
    (tmp_path / "file").write_bytes(bytes(LARGE))
    storage.put_file("file", tmp_path / "file")
    chunks = storage.chunks("file")
    next(chunks)
    own.kill()
    try:
        with pytest.raises(StorageUnavailable):
            list(chunks)
    finally:
        own.start()


def test_a_signed_url_is_good_for_one_thing(seaweed: Seaweed) -> None:
    storage = seaweed.storage()
    with httpx.Client(trust_env=False) as http:
        put = storage.presigned("PUT", "signed/a", 60)
        assert put is not None
        assert http.put(put, content=b"hello").status_code == 200
        assert storage.get_bytes("signed/a") == b"hello"
        get = storage.presigned("GET", "signed/a", 60)
        assert get is not None
        assert http.get(get).content == b"hello"
        assert http.get(put).status_code == 403
        assert http.get(get.replace("signed/a", "signed/b")).status_code == 403
    assert OWNER[1] not in put


def test_a_folder_signs_nothing(tmp_path: Path) -> None:
    assert Storage.open(tmp_path.as_uri()).presigned("GET", "a", 60) is None


def test_parameters_go_into_urls_of_buckets_only() -> None:
    endpoint = "http://127.0.0.1:1"
    url = with_parameters(f"s3://{BUCKET}/p", endpoint=endpoint, region=REGION, path_style=None)
    assert url == f"s3://{BUCKET}/p?endpoint=http%3A%2F%2F127.0.0.1%3A1&region={REGION}"
    assert with_parameters(url, endpoint="http://other") == url
    assert with_parameters("file:///p", endpoint=endpoint) == "file:///p"
