"""Connections that come to no end, and heads without measure, are ended by the service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest
import uvicorn

from service.connections import Connection

HEAD = b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n"


class Hasty(Connection):
    """A connection with little patience."""

    head_limit = 4096
    head_seconds = 0.4
    silent_seconds = 0.4
    look_seconds = 0.05


class Patient(Hasty):
    """One that outlives the stalls of a busy machine."""

    silent_seconds = 1.5


class Recorder:
    """An application that reads bodies, and notes how they end."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.hold = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive()).get("more_body"):
            pass
        self.ends.append(message["type"])
        if scope["path"] == "/slow":
            await self.hold.wait()
        with suppress(Exception):
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def served(
    app: Recorder, kind: type[Connection] = Hasty
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to the application."""
    config = uvicorn.Config(app, http=kind, lifespan="off", log_config=None, port=0, ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        app.hold.set()
        with closing(writer), suppress(OSError):
            await writer.drain()
        server.should_exit = True
        await task


def answer(raw: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)


async def talk(app: Recorder, *pieces: bytes, pause: float = 0.0) -> bytes:
    """What the service says before it closes the connection."""
    async with served(app) as (reader, writer):
        with suppress(OSError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
        with suppress(OSError):
            return await asyncio.wait_for(reader.read(), 20)
        return b""


@pytest.mark.parametrize(
    "pieces",
    [(), (b"GET / HTTP/1.1\r\nHost:",), (b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 1000)],
    ids=["nothing", "half a head", "a head that drips"],
)
def test_a_head_that_does_not_come_ends_the_connection(pieces: tuple[bytes, ...]) -> None:
    app = Recorder()
    assert asyncio.run(talk(app, *pieces, pause=0.02)) == b""
    assert app.ends == []


def test_a_body_that_stops_is_an_interrupted_one() -> None:
    app = Recorder()
    assert asyncio.run(talk(app, HEAD + b"x" * 10)) == b""
    assert app.ends == ["http.disconnect"]


def test_a_silent_connection_is_closed_after_its_answer() -> None:
    app = Recorder()
    said = asyncio.run(talk(app, HEAD + b"x" * 100 + b"\r\n"))  # an empty line begins no request
    assert said.startswith(b"HTTP/1.1 200")
    assert app.ends == ["http.request"]


def test_a_slow_body_and_a_slow_answer_are_waited_for() -> None:
    async def run() -> bytes:
        app = Recorder()
        async with served(app, Patient) as (reader, writer):
            writer.write(HEAD.replace(b"PUT /", b"PUT /slow"))
            for _ in range(20):
                writer.write(b"x" * 5)
                await writer.drain()
                await asyncio.sleep(0.1)  # 2 s in all, though never 1.5 s of silence
            await asyncio.sleep(2)
            app.hold.set()
            return await reader.readuntil(b"ok")

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("line", [b"X: " + b"a" * 300_000, b"X: a\r\n" * 50_000], ids=["long", "many"])
def test_a_head_without_measure_is_refused(line: bytes) -> None:
    app = Recorder()
    said = asyncio.run(talk(app, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", line))
    if said:  # what was not read when the connection was closed may have reset it
        assert answer(said)[0] == 431
        assert answer(said)[1]["code"] == "headers_too_large"
    assert app.ends == []


def test_what_is_no_request_is_answered_with_a_problem() -> None:
    status, problem = answer(asyncio.run(talk(Recorder(), b"\x16\x03\x01 hello\r\n\r\n")))
    assert (status, problem["code"]) == (400, "bad_request")


def test_the_service_has_such_connections(http: httpx.Client) -> None:
    assert http.get("/healthz", headers={"X-Long": "a" * 8000}).status_code == 200
    try:
        answer = http.get("/healthz", headers={"X-Long": "a" * (1 << 20)})
    except httpx.TransportError:  # it was reset while it sent
        return
    assert answer.json()["code"] == "headers_too_large"


def test_what_is_refused_by_its_name_or_length_need_not_be_sent(http: httpx.Client) -> None:
    """`curl -T` asks with `Expect: 100-continue` before it sends a big file."""
    for name, status in (("big.bin", 422), ("big.safetensors", 413)):
        with closing(HTTPConnection(http.base_url.host, http.base_url.port or 80, timeout=20)) as connection:
            connection.putrequest("PUT", f"/v1/models/ns/expecting/files/{name}")
            connection.putheader("Content-Length", str(1 << 40))
            connection.putheader("Expect", "100-continue")
            connection.endheaders()
            assert connection.getresponse().status == status
