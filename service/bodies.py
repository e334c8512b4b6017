"""Bodies of requests that carry a file."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request
from starlette.requests import ClientDisconnect

from merging.formats.sniff import refuse_foreign

HEAD = 512
"""So many bytes tell a pickle or an archive from weights."""
_DRAIN = 64 << 20


async def sniffed(chunks: AsyncIterator[bytes], name: str) -> AsyncIterator[bytes]:
    """The same chunks, unless their first bytes show a pickle or an archive: ``pickle_not_accepted``."""
    head = b""
    checked = False
    async for chunk in chunks:
        if checked:
            yield chunk
            continue
        head += chunk
        if len(head) >= HEAD:
            refuse_foreign(head[:HEAD], name)
            checked = True
            yield head
    if not checked:
        refuse_foreign(head, name)
        yield head


async def drain(request: Request) -> None:
    """Read on a little, because clients look for the answer only after they have sent everything.

    Those that ask before they send anything look for it at once.
    """
    if request.headers.get("expect", "").lower() == "100-continue":
        return
    left = _DRAIN
    try:
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return
    except (ClientDisconnect, RuntimeError):  # gone, or read to its end before
        return
