"""A push of a big file that breaks off goes on with the parts that are missing."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from adapters import write_adapter

from merging.errors import MergeFailure
from service import client_uploads
from service.client import Client
from tests.running import Up

WEIGHTS = "adapter_model.safetensors"
STEP = 1 << 16


class Line:
    """A TCP relay to the service that notes the parts which pass it, and that can be cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.parts: Counter[int] = Counter()
        self.cut_after: int | None = None
        """Cut every connection as soon as so many parts have been asked for."""
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._open += [near, far]
                for source, sink, look in ((near, far, True), (far, near, False)):
                    thread = threading.Thread(target=self._pump, args=(source, sink, look))
                    thread.start()
                    self._threads.append(thread)

    def _pump(self, source: socket.socket, sink: socket.socket, look: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 14):
                if look:
                    asked = [int(n) for n in re.findall(rb"PUT /v1/uploads/\w+/parts/(\d+)", data)]
                    self.parts.update(asked)
                    if self.cut_after is not None and sum(self.parts.values()) > self.cut_after:
                        self.cut()
                        return
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Break all connections that there are."""
        with self._lock:
            for item in self._open:
                with suppress(OSError):
                    item.shutdown(socket.SHUT_RDWR)
                item.close()
            self._open.clear()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def line(up: Up) -> Iterator[Line]:
    relay = Line(httpx.URL(up.url).port or 80)
    yield relay
    relay.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of some 16 parts, of which one is sent after the other."""
    monkeypatch.setattr(client_uploads, "PARTS_AT_ONCE", 1)
    monkeypatch.setattr(client_uploads, "PART_BYTES", STEP)
    monkeypatch.setattr(client_uploads, "_PAUSE_SECONDS", 0.01)
    seed = zlib.crc32(tmp_path.name.encode())
    return write_adapter(tmp_path / "a", modules={"layers.0.q_proj": (16000, 16000)}, rank=8, seed=seed)


def count(folder: Path) -> int:
    return -(-(folder / WEIGHTS).stat().st_size // STEP)


def received(up: Up, folder: Path, model: str) -> list[int]:
    """The parts that the service has of an upload that is announced once more."""
    content = (folder / WEIGHTS).read_bytes()
    announcement = {"model": model, "path": WEIGHTS, "size": len(content)}
    sha256 = hashlib.sha256(content).hexdigest()
    session = up.http.post("/v1/uploads", json={**announcement, "sha256": sha256})
    assert session.status_code == 200
    return [part["number"] for part in session.json()["parts"] if part["received"]]


def test_after_a_break_only_the_missing_parts_are_sent(up: Up, line: Line, folder: Path) -> None:
    line.cut_after = 6
    with (
        Client(f"http://127.0.0.1:{line.port}", parts_above=STEP) as client,
        pytest.raises(MergeFailure) as raised,
    ):
        client.push_dir(folder, "resume/a")
    assert raised.value.code in ("upload_interrupted", "service_unreachable")
    there = received(up, folder, "resume/a")
    assert 0 < len(there) < count(folder)

    line.cut_after = None
    line.parts.clear()
    with Client(f"http://127.0.0.1:{line.port}", parts_above=STEP) as client:
        revision = client.push_dir(folder, "resume/a")
    assert line.parts == Counter(number for number in range(1, count(folder) + 1) if number not in there)
    with up.client() as client:
        stored = client._http.get(f"/v1/models/resume/a/files/{WEIGHTS}").content
    assert stored == (folder / WEIGHTS).read_bytes()
    assert revision["format"] == "peft"


def test_one_broken_connection_is_bridged(line: Line, folder: Path) -> None:
    stop = threading.Event()

    def cut_once() -> None:
        while not stop.wait(0.001):
            if len(line.parts) >= 5:
                line.cut()
                return

    thread = threading.Thread(target=cut_once)
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{line.port}", parts_above=STEP) as client:
            assert client.push_dir(folder, "resume/b")["format"] == "peft"
    finally:
        stop.set()
        thread.join()
    assert len(line.parts) == count(folder)


def test_small_files_are_sent_whole(line: Line, folder: Path) -> None:
    with Client(f"http://127.0.0.1:{line.port}") as client:
        client.push_dir(folder, "resume/c")
    assert not line.parts


def test_several_parts_at_once(line: Line, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_uploads, "PARTS_AT_ONCE", 4)
    with Client(f"http://127.0.0.1:{line.port}", parts_above=STEP) as client:
        client.push_dir(folder, "resume/d")
    assert line.parts == Counter(range(1, count(folder) + 1))


def test_a_key_is_not_sent_to_where_the_parts_go(line: Line, folder: Path) -> None:
    seen: list[str | None] = []
    with Client(f"http://127.0.0.1:{line.port}", key="mk_secret", parts_above=STEP) as client:
        client._bare.event_hooks["request"].append(lambda r: seen.append(r.headers.get("authorization")))
        client.push_dir(folder, "resume/e")
    assert len(seen) == count(folder)
    assert set(seen) == {None}


def test_a_service_that_is_away_for_a_moment_is_waited_for(
    up: Up, line: Line, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is dead for the first tries, in which not even the announcement gets through."""
    line.cut_after = 3
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            line.cut_after = None

    monkeypatch.setattr(client_uploads.time, "sleep", pause)
    with Client(f"http://127.0.0.1:{line.port}", parts_above=STEP) as client:
        assert client.push_dir(folder, "resume/f")["format"] == "peft"
    assert len(pauses) >= 2
    assert pauses == sorted(pauses)


def test_a_killed_service_goes_on_with_the_parts_it_has(tmp_path: Path, folder: Path) -> None:
    running = Up(tmp_path / "up")
    try:
        content = (folder / WEIGHTS).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        announcement = {"model": "resume/g", "path": WEIGHTS, "size": len(content), "sha256": sha256}
        session = running.http.post("/v1/uploads", json={**announcement, "part_size": STEP}).json()
        urls = session["actions"]["upload"]["header"]
        for number in (1, 2, 5):
            part = content[(number - 1) * STEP : number * STEP]
            assert running.http.put(urls[f"{number:05d}"], content=part).is_success

        def half() -> Iterator[bytes]:
            yield content[2 * STEP : 2 * STEP + 1000]
            running.process.kill()
            running.process.wait()
            yield content[2 * STEP + 1000 : 3 * STEP]

        with pytest.raises(httpx.TransportError):
            running.http.put(urls["00003"], content=half())
        running.http.close()
        running.start()
        assert received(running, folder, "resume/g") == [1, 2, 5]
        with Client(running.url, parts_above=STEP) as client:
            sent: list[str] = []
            client._bare.event_hooks["request"].append(lambda request: sent.append(request.url.path))
            client.push_dir(folder, "resume/g")
        assert len(sent) == count(folder) - 3
        stored = running.http.get(f"/v1/models/resume/g/files/{WEIGHTS}").content
        assert stored == content
    finally:
        running.stop()
