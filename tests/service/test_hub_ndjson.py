"""The body of a commit, cut into pieces at every place."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.errors import BadRequest
from service.hub.ndjson import LINE_LIMIT, CommitBody, Line
from service.storage import Blob

CONTENT = bytes(range(256)) * 5


def read(body: bytes, step: int = 1 << 16) -> tuple[list[Line], list[bytes]]:
    """The lines of a body that arrives in pieces of some size, and the contents that were kept."""
    kept: list[bytes] = []

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), step):
            yield body[start : start + step]

    async def keep(chunks: AsyncIterator[bytes]) -> Blob:
        kept.append(b"".join([chunk async for chunk in chunks]))
        return Blob(str(len(kept)), len(kept[-1]))

    async def lines() -> list[Line]:
        return [line async for line in CommitBody(pieces(), keep).lines()]

    return asyncio.run(lines()), kept


def line(key: str, value: Any, **more: Any) -> bytes:
    return json.dumps({"key": key, "value": value, **more}).encode() + b"\n"


def file(path: str, content: bytes) -> bytes:
    return line("file", {"content": base64.b64encode(content).decode(), "path": path, "encoding": "base64"})


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 64, 1 << 16])
def test_wherever_the_body_is_cut_it_reads_the_same(step: int) -> None:
    summary = {"summary": 'a "content": "dGVzdA==" of no file', "description": "é"}
    body = line("header", summary) + file("a", CONTENT) + b"\n" + file("b", b"") + file("c", b"1")
    body += line("deletedFile", {"path": "d"}).rstrip()
    lines, kept = read(body, step)
    assert [item.key for item in lines] == ["header", "file", "file", "file", "deletedFile"]
    assert lines[0].value == summary
    assert [item.value.get("path") for item in lines[1:]] == ["a", "b", "c", "d"]
    assert [item.blob.size if item.blob else None for item in lines] == [None, len(CONTENT), 0, 1, None]
    assert kept == [CONTENT, b"", b"1"]


def test_the_order_of_the_fields_does_not_matter() -> None:
    encoded = base64.b64encode(CONTENT).decode()
    body = json.dumps({"value": {"path": "a", "encoding": "base64", "content": encoded}, "key": "file"})
    lines, kept = read(body.encode())
    assert (lines[0].value, kept) == ({"path": "a", "encoding": "base64"}, [CONTENT])


@pytest.mark.parametrize(
    "body",
    [
        b"nothing\n",
        b"[1]\n",
        b'{"key": "file"}\n',
        b'{"value": {}}\n',
        line("file", {"path": "a"}),
        line("lfsFile", {"path": "a", "content": "QQ=="}),
        line("file", {"path": "a", "content": 3}),
        line("file", {"path": "a"}, content="QQ=="),
        line("file", {"path": "a", "content": "QQ==QQ=="}),
        line("file", {"path": "a", "content": "QQ"}),
        line("file", {"path": "a", "content": "Q\u00e4=="}),
        b'{"key": "file", "value": {"content": "QUJD',
        b'{"key": "file", "value": {"content": "QUJD", "path',
        b'{"key": "file", "value": {"content": "QUJD", "path": "' + b"a" * (LINE_LIMIT + 70000),
        b'{"key": "header", "value": {"summary": "' + b"a" * (LINE_LIMIT + 70000),
        b"[" * 50000,
    ],
)
@pytest.mark.parametrize("step", [5, 1 << 16])
def test_what_is_malformed_is_refused(body: bytes, step: int) -> None:
    with pytest.raises(BadRequest) as caught:
        read(body, step)
    assert caught.value.code == "commit_malformed"


def test_a_large_file_is_never_held_as_a_whole() -> None:
    sizes: list[int] = []
    encoded = base64.b64encode(bytes(3 << 20))

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"key": "file", "value": {"encoding": "base64", "path": "a", "content": "'
        for start in range(0, len(encoded), 1 << 16):
            yield encoded[start : start + (1 << 16)]
        yield b'"}}'

    async def keep(chunks: AsyncIterator[bytes]) -> Blob:
        async for chunk in chunks:
            sizes.append(len(chunk))
        return Blob("", sum(sizes))

    async def lines() -> list[Line]:
        return [line async for line in CommitBody(pieces(), keep).lines()]

    assert asyncio.run(lines())[0].blob == Blob("", 3 << 20)
    assert max(sizes) <= 1 << 16


def test_empty_lines_are_passed_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, a megabyte of them would keep the event loop from everybody else for most of a second."""
    searches = 0
    search = CommitBody._head

    async def counted(self: CommitBody) -> tuple[bytes, bool] | None:
        nonlocal searches
        searches += 1
        return await search(self)

    monkeypatch.setattr(CommitBody, "_head", counted)
    last = line("deletedFile", {"path": "a"})
    lines, _ = read(b"\n" * (1 << 20) + last + b"\n" * 3 + last)
    assert [found.key for found in lines] == ["deletedFile"] * 2
    assert searches <= 5
