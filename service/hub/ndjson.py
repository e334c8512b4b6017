"""The body of a commit: one JSON object a line, the files in it as base64.

A file may have hundreds of megabytes, so its line is never held as a whole: what stands between the quotes of
``content`` is decoded as it arrives and handed on; the rest of the line is parsed as JSON.
"""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from service.errors import BadRequest
from service.hub.bodies import parse
from service.storage import Blob

LINE_LIMIT = 64 << 10
"""Most bytes of a line without the content of its file."""

Keep = Callable[[AsyncIterator[bytes]], Awaitable[Blob]]
_CONTENT = re.compile(rb'(?<!\\)"content"[ \t]{0,8}:[ \t]{0,8}"')
_OVERLAP = 40
"""No match is longer; what was searched before need not be searched again, but for its end."""


@dataclass(frozen=True)
class Line:
    """One line: what it is, its fields, and the file that it carried."""

    key: str
    value: dict[str, Any]
    blob: Blob | None = None


class CommitBody:
    """The lines of a body. Contents go to ``keep`` in the order in which they arrive."""

    def __init__(self, chunks: AsyncIterable[bytes], keep: Keep) -> None:
        self._chunks = aiter(chunks)
        self._keep = keep
        self._buffer = bytearray()

    async def lines(self) -> AsyncIterator[Line]:
        """Each line. Raises ``commit_malformed``, and whatever ``keep`` raises."""
        while (found := await self._head()) is not None:
            head, opened = found
            blob = None
            if opened:
                blob = await self._keep(self._content())
                head += await self._until_newline()
            if head.strip():
                yield _parse(head, blob)

    async def _head(self) -> tuple[bytes, bool] | None:
        """A line up to its end (False) or to the start of a content (True); None after the last one."""
        searched = 0
        while True:
            if self._buffer[:1] == b"\n":  # all empty lines at once, be there ever so many
                self._buffer = self._buffer.lstrip(b"\n")
                searched = 0
            end = self._buffer.find(b"\n", searched)
            opening = _CONTENT.search(self._buffer, searched, len(self._buffer) if end < 0 else end)
            if opening:
                return self._take(opening.end()), True
            if end >= 0:
                return self._take(end + 1), False
            if len(self._buffer) > LINE_LIMIT:
                raise _malformed(f"a line has more than {LINE_LIMIT} bytes beside its content")
            searched = max(0, len(self._buffer) - _OVERLAP)
            if not await self._fill():
                rest = self._take(len(self._buffer))
                return (rest, False) if rest else None

    async def _content(self) -> AsyncIterator[bytes]:
        """The bytes of a file, up to the closing quote, which stays in the buffer."""
        left = b""
        while True:
            end = self._buffer.find(b'"')
            data = left + self._take(len(self._buffer) if end < 0 else end)
            whole = len(data) if end >= 0 else max(0, len(data) - 4) // 4 * 4  # padding stays together
            try:
                yield base64.b64decode(data[:whole], validate=True)
            except ValueError:
                raise _malformed("a content is not base64") from None
            if end >= 0:
                return
            left = data[whole:]
            if b"=" in data[:whole] or not await self._fill():
                raise _malformed("a content breaks off")

    async def _until_newline(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if len(self._buffer) > LINE_LIMIT:
                raise _malformed(f"a line has more than {LINE_LIMIT} bytes beside its content")
            if not await self._fill():
                return self._take(len(self._buffer))
        return self._take(end + 1)

    async def _fill(self) -> bool:
        chunk = await anext(self._chunks, None)
        if chunk is None:
            return False
        self._buffer += chunk
        return True

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


def _parse(line: bytes, blob: Blob | None) -> Line:
    try:
        data = parse(line)
    except ValueError:
        raise _malformed("a line is not JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("key"), str):
        raise _malformed("a line has no key")
    key, value = data["key"], data.get("value")
    if not isinstance(value, dict):
        raise _malformed(f"the line {key[:40]!r} has no value")
    carried = value.pop("content", None)
    if (carried is not None) != (blob is not None) or (blob is not None) != (key == "file"):
        raise _malformed(f"the line {key[:40]!r} has a content where none belongs, or none where one does")
    return Line(key, value, blob)


def _malformed(what: str) -> BadRequest:
    return BadRequest("commit_malformed", f"the body of the commit is malformed: {what}")
