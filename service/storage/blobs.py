"""Blobs: what they are called, and what can be wrong with one that arrives."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass

BLOBS = "blobs"
STAGING = "staging"
"""Uploads on their way; nothing refers to them."""


@dataclass(frozen=True)
class Blob:
    """What was stored: its sha256 (hex), its size in bytes, and whether it was not there before."""

    sha256: str
    size: int
    new: bool = True


def blob_key(tenant: str, sha256: str) -> str:
    """Where the content with this digest lies; de-duplicated inside a tenant, never across."""
    return f"{BLOBS}/{tenant}/sha256/{sha256[:2]}/{sha256}"


class StreamTooLong(Exception):
    """More bytes came than the limit allows."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"more than {limit} bytes")
        self.limit = limit


class DigestMismatch(Exception):
    """The content does not have the digest that was promised."""

    def __init__(self, expected: str, actual: str) -> None:
        super().__init__(f"expected sha256 {expected}, got {actual}")
        self.expected = expected
        self.actual = actual


class Arrival:
    """A stream on its way into the storage: counted, digested and, at its end, compared."""

    def __init__(self, chunks: AsyncIterable[bytes], limit: int, expect: str | None) -> None:
        self._chunks = chunks
        self._limit = limit
        self._expect = expect
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """Of what has come so far (hex)."""
        return self._digest.hexdigest()

    async def checked(self) -> AsyncIterator[bytes]:
        """The chunks that are not empty. Raises :class:`StreamTooLong` and :class:`DigestMismatch`."""
        async for chunk in self._chunks:
            self.size += len(chunk)
            if self.size > self._limit:
                raise StreamTooLong(self._limit)
            self._digest.update(chunk)
            if chunk:
                yield chunk
        if self._expect not in (None, self.sha256):
            raise DigestMismatch(str(self._expect), self.sha256)
