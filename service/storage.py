"""Object storage: immutable blobs named by their content, and small JSON documents.

One object store holds everything that must survive; today a local folder. The synchronous methods are for
workers, the command line and request threads; the asynchronous ones only for the API's event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import LocalStore, ObjectStore

from merging.errors import InputError

CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """What was stored: its sha256 (hex), its size in bytes, and whether it was not there before."""

    sha256: str
    size: int
    new: bool = True


def blob_key(tenant: str, sha256: str) -> str:
    """Where the content with this digest lies; de-duplicated inside a tenant, never across."""
    return f"blobs/{tenant}/sha256/{sha256[:2]}/{sha256}"


class Storage:
    """An object store. ``root`` is its folder when it is local, which allows links instead of copies."""

    def __init__(self, store: ObjectStore, root: Path | None = None) -> None:
        self._store = store
        self._root = root

    @classmethod
    def open(cls, url: str) -> Storage:
        """The store at a URL. Raises ``storage_url_unsupported``."""
        parts = urlsplit(url)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
            raise InputError(
                "storage_url_unsupported",
                f"the storage URL {url!r} is not supported",
                remedy="Use file:///absolute/folder",
                where={"field": "MERGANSER_STORAGE_URL"},
            )
        root = Path(unquote(parts.path))
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return cls(LocalStore(prefix=root), root)

    # documents

    def put_json(self, key: str, document: Any) -> None:
        """Write a document atomically, replacing an older one."""
        data = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        obstore.put(self._store, key, data)
        self._to_disk(key)

    def get_json(self, key: str) -> Any | None:
        """The document, or None."""
        data = self.get_bytes(key)
        return None if data is None else json.loads(data)

    def get_bytes(self, key: str) -> bytes | None:
        """A small object as a whole, or None."""
        try:
            return bytes(obstore.get(self._store, key).bytes())
        except FileNotFoundError:
            return None

    # files

    def put_file(self, key: str, path: Path) -> None:
        """Store a file that nobody changes afterwards: on the same volume it is linked, not copied."""
        if self._root is None or not _linked(path, self._root / key):
            obstore.put(self._store, key, path)
        self._to_disk(key)

    def fetch(self, key: str, target: Path) -> None:
        """Bring an object to ``target``, which must be treated as read-only: it may be a link."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._root is not None:
            if not _linked(self._root / key, target):
                shutil.copyfile(self._root / key, target)
            return
        with target.open("xb") as file:
            for chunk in obstore.get(self._store, key).stream(min_chunk_size=CHUNK):
                file.write(chunk)

    def copy(self, key: str, target: str) -> None:
        """Give an object a second key; the store does it by itself."""
        obstore.copy(self._store, key, target)
        self._to_disk(target)

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None when there is no such object."""
        try:
            return obstore.head(self._store, key)["size"]
        except FileNotFoundError:
            return None

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        """The keys below a prefix with their sizes, sorted."""
        found = [(meta["path"], meta["size"]) for page in obstore.list(self._store, prefix) for meta in page]
        yield from sorted(found)

    def delete(self, key: str) -> None:
        """Remove an object; its absence is fine."""
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            return

    def delete_prefix(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        for key, _ in self.keys(prefix):
            self.delete(key)

    def _to_disk(self, key: str) -> None:
        """Make a local object survive a power cut before anything refers to it."""
        if self._root is None:
            return
        for path in (self._root / key, (self._root / key).parent):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    # streams of the API

    async def put_stream(
        self, tenant: str, chunks: AsyncIterable[bytes], *, limit: int, expect: str | None = None
    ) -> Blob:
        """Store a stream as a blob. Nothing is kept when it is too long, breaks off, or differs.

        ``expect`` is the sha256 (hex) that the content must have. Raises :class:`StreamTooLong` and
        :class:`DigestMismatch`.
        """
        digest = hashlib.sha256()
        size = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    raise StreamTooLong(limit)
                digest.update(chunk)
                if chunk:
                    yield chunk
            if expect is not None and digest.hexdigest() != expect:
                raise DigestMismatch(expect, digest.hexdigest())

        staged = f"staging/{tenant}/{uuid.uuid4().hex}"
        await obstore.put_async(self._store, staged, counted())
        key = blob_key(tenant, digest.hexdigest())
        known = await asyncio.to_thread(self.size, key)
        await asyncio.to_thread(self._to_disk, staged)
        await obstore.rename_async(self._store, staged, key)
        return Blob(digest.hexdigest(), size, new=known is None)

    async def stream(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes ``[start, end)`` of an object in chunks."""
        if start >= end:
            return
        found = await obstore.get_async(self._store, key, options={"range": (start, end)})
        async for chunk in found.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)


def _linked(source: Path, target: Path) -> bool:
    """Give a file a second name if the file system can; the folder of ``target`` is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another volume, a file system without links, or the name is taken
        return False
    return True


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
