"""Blobs: what they are called, and what can be wrong with one that arrives."""

from __future__ import annotations

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
