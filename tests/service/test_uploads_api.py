"""Uploads in parts: in any order, in parallel, over breaks; checked in the end, gone after a while."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import random
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from adapters import write_adapter

from merging.errors import MergeError
from service.broker import connect_async
from service.embedded_redis import EmbeddedRedis
from service.quota import usage_key
from service.registry import Registry
from service.settings import Settings
from service.storage import Storage
from service.upload_sessions import Upload, part_key
from service.uploads import Uploads, expired
from tests.running import Up
from tests.seaweed import Seaweed, in_bucket

STEP = 1 << 16
MISSING = "upl_" + "0" * 32


def text(size: int, seed: int = 0) -> bytes:
    """Bytes that are no pickle and no archive."""
    return b"# " + random.Random(seed).randbytes(size - 2)


def announce(
    http: httpx.Client, name: str, content: bytes, *, path: str = "README.md", **more: Any
) -> httpx.Response:
    body = {
        "model": name,
        "path": path,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "part_size": STEP,
    }
    return http.post("/v1/uploads", json={**body, **more})


def urls(session: dict[str, Any]) -> dict[int, str]:
    header = session["actions"]["upload"]["header"]
    assert header["chunk_size"] == str(session["part_size"])
    return {int(name): url for name, url in header.items() if name != "chunk_size"}


def pieces(content: bytes) -> dict[int, bytes]:
    return {i // STEP + 1: content[i : i + STEP] for i in range(0, len(content), STEP)}


def received(session: dict[str, Any]) -> list[int]:
    return [part["number"] for part in session["parts"] if part["received"]]


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


@pytest.fixture
def bare() -> Iterator[httpx.Client]:
    """A client without a key."""
    with httpx.Client(trust_env=False, timeout=30) as client:
        yield client


class TestTheWayItGoes:
    def test_parts_in_any_order_and_at_once_become_a_revision(
        self, http: httpx.Client, bare: httpx.Client, tmp_path: Path
    ) -> None:
        folder = write_adapter(tmp_path / "a", modules={"layers.0.q_proj": (4000, 4000)}, rank=8)
        weights = (folder / "adapter_model.safetensors").read_bytes()
        answer = announce(http, "parts/whole", weights, path="adapter_model.safetensors")
        assert answer.status_code == 201
        session = answer.json()
        assert answer.headers["location"].endswith(f"/v1/uploads/{session['id']}")
        assert (session["state"], received(session), session["file"]) == ("open", [], None)
        parts = list(pieces(weights).items())
        random.Random(1).shuffle(parts)
        with ThreadPoolExecutor(4) as pool:
            sent = list(pool.map(lambda item: bare.put(urls(session)[item[0]], content=item[1]), parts))
        for (number, content), put in zip(parts, sent, strict=True):
            sha256 = hashlib.sha256(content).hexdigest()
            assert put.json() == {"number": number, "size": len(content), "sha256": sha256}
            assert put.headers["etag"] == f'"{sha256}"'
        done = bare.post(session["actions"]["upload"]["href"], json={"oid": session["sha256"], "parts": []})
        assert done.status_code == 200
        assert done.json()["state"] == "complete"
        assert done.json()["file"] == {
            "path": "adapter_model.safetensors", "sha256": session["sha256"], "size": len(weights)
        }  # fmt: skip
        config = (folder / "adapter_config.json").read_bytes()
        assert http.put("/v1/models/parts/whole/files/adapter_config.json", content=config).is_success
        assert http.post("/v1/models/parts/whole/commit").status_code == 201
        stored = http.get("/v1/models/parts/whole/files/adapter_model.safetensors")
        assert stored.content == weights

    def test_the_same_announcement_goes_on_with_what_is_there(
        self, http: httpx.Client, bare: httpx.Client
    ) -> None:
        content = text(3 * STEP + 5)
        first = announce(http, "parts/again", content).json()
        bare.put(urls(first)[2], content=pieces(content)[2])
        again = announce(http, "parts/again", content, part_size=1 << 20)
        assert again.status_code == 200
        assert (again.json()["id"], again.json()["part_size"], received(again.json())) == (
            first["id"], STEP, [2],
        )  # fmt: skip
        assert received(http.get(f"/v1/uploads/{first['id']}").json()) == [2]
        assert announce(http, "parts/again", text(3 * STEP + 5, seed=1)).json()["id"] != first["id"]

    def test_a_part_may_be_sent_again_also_with_a_key_instead_of_a_signature(
        self, http: httpx.Client, bare: httpx.Client
    ) -> None:
        content = text(2 * STEP)
        session = announce(http, "parts/twice", content).json()
        for _ in range(2):
            assert bare.put(urls(session)[1], content=content[:STEP]).is_success
            assert http.put(f"/v1/uploads/{session['id']}/parts/2", content=content[STEP:]).is_success
        assert http.post(f"/v1/uploads/{session['id']}/complete").json()["state"] == "complete"

    def test_completing_again_gives_the_same_answer_and_parts_are_gone(self, up: Up) -> None:
        content = text(2 * STEP, seed=3)
        session = announce(up.http, "parts/done", content).json()
        for number, piece in pieces(content).items():
            up.http.put(f"/v1/uploads/{session['id']}/parts/{number}", content=piece)
        first, second = (up.http.post(f"/v1/uploads/{session['id']}/complete") for _ in range(2))
        assert first.json() == second.json() == up.http.get(f"/v1/uploads/{session['id']}").json()
        assert first.json()["actions"] is None
        assert not [p for p in (up.storage / "staging").rglob(f"{session['id']}/*") if p.is_file()]
        late = up.http.put(f"/v1/uploads/{session['id']}/parts/1", content=content[:STEP])
        assert code(late) == (409, "upload_complete")
        assert announce(up.http, "parts/done", content).json() == first.json()  # it is staged still

    def test_aborting_gives_everything_back(self, up: Up) -> None:
        with up.redis() as connection:
            before = int(connection.get(usage_key("local")) or 0)
            session = announce(up.http, "parts/abort", text(3 * STEP)).json()
            up.http.put(f"/v1/uploads/{session['id']}/parts/1", content=text(3 * STEP)[:STEP])
            assert int(connection.get(usage_key("local")) or 0) == before + 3 * STEP
            assert up.http.delete(f"/v1/uploads/{session['id']}").status_code == 204
            assert int(connection.get(usage_key("local")) or 0) == before
        assert code(up.http.get(f"/v1/uploads/{session['id']}")) == (404, "upload_not_found")
        assert not [p for p in (up.storage / "staging").rglob(f"{session['id']}/*") if p.is_file()]


class TestWhatGoesWrong:
    @pytest.fixture
    def session(self, http: httpx.Client, request: pytest.FixtureRequest) -> dict[str, Any]:
        found: dict[str, Any] = announce(
            http, "parts/wrong", text(2 * STEP + 7, seed=zlib.crc32(request.node.name.encode()))
        ).json()
        return found

    def test_a_part_with_a_wrong_size(self, http: httpx.Client, session: dict[str, Any]) -> None:
        here = f"/v1/uploads/{session['id']}/parts"
        assert code(http.put(f"{here}/1", content=bytes(STEP + 1))) == (413, "part_too_large")
        assert code(http.put(f"{here}/1", content=bytes(STEP - 1))) == (422, "part_size_mismatch")
        assert code(http.put(f"{here}/3", content=bytes(8))) == (413, "part_too_large")
        assert code(http.put(f"{here}/4", content=b"")) == (422, "part_number_invalid")
        assert code(http.put(f"{here}/0", content=b"")) == (422, "request_invalid")
        assert received(http.get(f"/v1/uploads/{session['id']}").json()) == []

    def test_a_part_with_a_wrong_digest(self, http: httpx.Client, session: dict[str, Any]) -> None:
        digest = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
        answer = http.put(
            f"/v1/uploads/{session['id']}/parts/3",
            content=bytes(7),
            headers={"Content-Digest": f"sha-256=:{digest}:"},
        )
        assert code(answer) == (422, "content_digest_mismatch")
        assert received(http.get(f"/v1/uploads/{session['id']}").json()) == []

    def test_a_missing_part(self, http: httpx.Client, session: dict[str, Any]) -> None:
        http.put(f"/v1/uploads/{session['id']}/parts/3", content=bytes(7))
        answer = http.post(f"/v1/uploads/{session['id']}/complete")
        assert code(answer) == (409, "part_missing")
        assert "1, 2" in answer.json()["detail"]

    def test_another_content_than_announced(self, http: httpx.Client) -> None:
        content = text(STEP + 1, seed=5)
        session = announce(http, "parts/other", content).json()
        here = f"/v1/uploads/{session['id']}"
        http.put(f"{here}/parts/1", content=text(STEP, seed=6))
        http.put(f"{here}/parts/2", content=content[STEP:])
        assert code(http.post(f"{here}/complete", json={"oid": "f" * 64})) == (422, "upload_digest_mismatch")
        assert received(http.get(here).json()) == [1, 2]
        assert code(http.post(f"{here}/complete")) == (422, "upload_digest_mismatch")
        assert received(http.get(here).json()) == []
        for number, piece in pieces(content).items():
            http.put(f"{here}/parts/{number}", content=piece)
        assert http.post(f"{here}/complete").is_success

    def test_a_pickle_in_parts(self, http: httpx.Client) -> None:
        content = b"PK\x03\x04" + bytes(STEP)
        session = announce(http, "parts/zip", content).json()
        for number, piece in pieces(content).items():
            http.put(f"/v1/uploads/{session['id']}/parts/{number}", content=piece)
        answer = http.post(f"/v1/uploads/{session['id']}/complete")
        assert answer.status_code == 422
        assert http.post("/v1/models/parts/zip/commit").json()["code"] == "nothing_to_commit"

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"path": "a.bin"}, (422, "pickle_not_accepted")),
            ({"path": "../a.json"}, (422, "path_invalid")),
            ({"model": "merges/a"}, (422, "name_reserved")),
            ({"model": "a"}, (422, "name_invalid")),
            ({"size": (8 << 20) + 1, "path": "a.safetensors"}, (413, "file_too_large")),
            ({"size": 0}, (422, "request_invalid")),
            ({"sha256": "F" * 64}, (422, "request_invalid")),
            ({"part_size": 1}, (422, "request_invalid")),
            ({"url": "http://x"}, (422, "request_invalid")),
        ],
    )
    def test_an_announcement_that_cannot_be(
        self, http: httpx.Client, change: dict[str, Any], expected: tuple[int, str]
    ) -> None:
        assert code(announce(http, "parts/bad", text(100), **change)) == expected

    def test_signatures(self, http: httpx.Client, bare: httpx.Client, session: dict[str, Any]) -> None:
        one, two = urls(session)[1], urls(session)[2]
        other = one.partition("?")[0] + "?" + two.partition("?")[2]
        content = text(STEP)
        assert code(bare.put(other, content=content)) == (403, "signature_invalid")
        stranger = one.replace("tenant=local", "tenant=other")
        assert code(bare.put(stranger, content=content)) == (403, "signature_invalid")
        old = one.replace("expires=", "expires=1")
        assert code(bare.put(old, content=content)) == (403, "signature_invalid")
        assert code(bare.put(one.replace(session["id"], MISSING), content=content))[0] == 403

    def test_unknown(self, http: httpx.Client) -> None:
        for answer in (
            http.get(f"/v1/uploads/{MISSING}"),
            http.put(f"/v1/uploads/{MISSING}/parts/1", content=b"1"),
            http.post(f"/v1/uploads/{MISSING}/complete"),
            http.delete(f"/v1/uploads/{MISSING}"),
        ):
            assert code(answer) == (404, "upload_not_found")

    def test_a_sender_that_breaks_off_leaves_nothing(
        self, http: httpx.Client, session: dict[str, Any]
    ) -> None:
        def broken() -> Iterator[bytes]:
            yield bytes(1000)
            raise ConnectionAbortedError

        with pytest.raises(ConnectionAbortedError):
            http.put(urls(session)[1], content=broken())
        time.sleep(0.1)
        assert received(http.get(f"/v1/uploads/{session['id']}").json()) == []


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage.open((tmp_path / "storage").as_uri())
    server: Seaweed = request.getfixturevalue("seaweed")
    return server.storage()


def uploads(
    storage: Storage, server: EmbeddedRedis, connection: redis.Redis, folder: Path, **more: int
) -> Uploads:
    events = connect_async(Settings(redis_url=server.url))
    limits = {"tenant_limit": 1 << 20, "file_limit": 1 << 20, "seconds": 3600, **more}
    return Uploads(storage, connection, events, Registry(storage, connection, folder), **limits)


async def stream(content: bytes) -> AsyncIterator[bytes]:
    yield content


def test_parts_can_go_straight_to_the_bucket(seaweed: Seaweed, bare: httpx.Client, tmp_path: Path) -> None:
    content = text(2 * STEP + 3)
    with in_bucket(seaweed, seaweed.url()):
        running = Up(tmp_path / "up", direct_uploads="true")
    try:
        session = announce(running.http, "parts/direct", content).json()
        for number, url in urls(session).items():
            assert url.startswith(seaweed.endpoint)
            assert bare.put(url, content=pieces(content)[number]).is_success
        assert bare.post(session["actions"]["upload"]["href"]).json()["state"] == "complete"
    finally:
        running.stop()


class TestPartsThatWentStraightToTheBucket:
    """Their URLs say nothing of sizes, so they are looked at afterwards."""

    @pytest.fixture
    def sent(
        self, seaweed: Seaweed, redis_server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
    ) -> tuple[Storage, Uploads, Upload]:
        """A session of three parts, of which the second has twice its size."""
        storage = seaweed.storage()
        some = uploads(storage, redis_server, connection, tmp_path)
        content = text(3 * STEP)
        upload, _ = some.open(
            "acme", size=len(content), sha256=hashlib.sha256(content).hexdigest(), part_size=STEP
        )
        for number, piece in pieces(content).items():
            url = storage.presigned("PUT", part_key(upload, number), 60)
            assert url is not None
            assert httpx.put(url, content=piece * (2 if number == 2 else 1), trust_env=False).is_success
        return storage, some, upload

    def test_one_of_another_size_does_not_stay(self, sent: tuple[Storage, Uploads, Upload]) -> None:
        storage, some, upload = sent

        async def work() -> None:
            assert some.parts.received(upload) == [1, 3]
            with pytest.raises(MergeError) as raised:
                await some.complete(upload)
            assert (raised.value.code, storage.size(part_key(upload, 2))) == ("part_size_mismatch", None)
            assert f"{2 * STEP} came" in raised.value.message
            await some.parts.put(upload, 2, stream(pieces(text(3 * STEP))[2]))
            assert (await some.complete(upload)).complete

        asyncio.run(work())

    def test_nor_does_it_if_nobody_completes_the_upload(
        self, sent: tuple[Storage, Uploads, Upload], connection: redis.Redis
    ) -> None:
        storage, some, upload = sent
        assert expired(storage, connection, time.time()) == []
        assert storage.size(part_key(upload, 2)) is None
        assert some.parts.received(upload) == [1, 3]


class TestAnyStorage:
    """What does not need the API, over a folder and over a real bucket."""

    def test_parts_are_joined(
        self, place: Storage, redis_server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
    ) -> None:
        content = text(3 * STEP + 9)
        some = uploads(place, redis_server, connection, tmp_path)
        upload, new = some.open("acme", size=len(content), sha256=hashlib.sha256(content).hexdigest())
        assert new
        assert upload.count == 1  # the usual size of parts

        upload, _ = some.open(
            "acme", size=len(content), sha256=hashlib.sha256(content).hexdigest(), model="a/b", path="a.md",
            part_size=STEP,
        )  # fmt: skip

        async def work() -> None:
            for number, piece in sorted(pieces(content).items(), reverse=True):
                direct = place.presigned("PUT", part_key(upload, number), 60)
                if direct is None:
                    await some.parts.put(upload, number, stream(piece))
                else:
                    assert httpx.put(direct, content=piece, trust_env=False).is_success
            assert some.parts.received(upload) == [1, 2, 3, 4]
            assert (await some.complete(upload)).complete

        asyncio.run(work())
        key = f"blobs/acme/sha256/{upload.sha256[:2]}/{upload.sha256}"
        assert place.get_bytes(key) == content

    def test_what_expires_is_removed_with_its_parts_and_its_room(
        self, place: Storage, redis_server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
    ) -> None:
        some = uploads(place, redis_server, connection, tmp_path, seconds=60)
        content = text(STEP)
        upload, _ = some.open("acme", size=STEP, sha256=hashlib.sha256(content).hexdigest())
        asyncio.run(some.parts.put(upload, 1, stream(content)))
        assert expired(place, connection, time.time()) == []
        assert int(connection.get(usage_key("acme")) or 0) == STEP
        assert expired(place, connection, time.time() + 61) == [upload.id]
        assert list(place.keys("staging")) == list(place.keys("uploads")) == []
        assert int(connection.get(usage_key("acme")) or 0) == 0
        assert expired(place, connection, time.time() + 61) == []

    def test_a_session_that_is_over_says_so_and_can_begin_anew(
        self, storage: Storage, redis_server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
    ) -> None:
        some = uploads(storage, redis_server, connection, tmp_path, seconds=0)
        upload, _ = some.open("acme", size=10, sha256="0" * 64)
        with pytest.raises(MergeError) as raised:
            some.get("acme", upload.id)
        assert raised.value.code == "upload_expired"
        again, new = uploads(storage, redis_server, connection, tmp_path).open(
            "acme", size=10, sha256="0" * 64
        )
        assert (again.id, new) == (upload.id, True)
        assert int(connection.get(usage_key("acme")) or 0) == 10

    def test_room_is_needed_before_the_first_byte(
        self, storage: Storage, redis_server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
    ) -> None:
        some = uploads(storage, redis_server, connection, tmp_path, tenant_limit=100)
        some.open("acme", size=60, sha256="0" * 64)
        some.open("acme", size=60, sha256="0" * 64)  # the same
        with pytest.raises(MergeError) as raised:
            some.open("acme", size=60, sha256="1" * 64)
        assert raised.value.code == "quota_exceeded"
        some.open("other", size=60, sha256="1" * 64)

    def test_another_tenant_sees_nothing(
        self, storage: Storage, redis_server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
    ) -> None:
        some = uploads(storage, redis_server, connection, tmp_path)
        upload, _ = some.open("acme", size=60, sha256="0" * 64)
        with pytest.raises(MergeError) as raised:
            some.get("other", upload.id)
        assert raised.value.code == "upload_not_found"

    def test_only_one_completes_at_a_time(
        self, storage: Storage, redis_server: EmbeddedRedis, connection: redis.Redis, tmp_path: Path
    ) -> None:
        some = uploads(storage, redis_server, connection, tmp_path)
        content = text(1000)
        upload, _ = some.open("acme", size=1000, sha256=hashlib.sha256(content).hexdigest())

        async def work() -> list[Any]:
            await some.parts.put(upload, 1, stream(content))
            return await asyncio.gather(*(some.complete(upload) for _ in range(5)), return_exceptions=True)

        outcomes = asyncio.run(work())
        errors = [item for item in outcomes if isinstance(item, MergeError)]
        assert len(errors) < 5
        assert {error.code for error in errors} <= {"upload_busy"}
        assert int(connection.get(usage_key("acme")) or 0) == 1000
