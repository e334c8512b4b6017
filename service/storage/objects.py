"""The storage as the service uses it, over a local folder or a bucket.

The synchronous methods are for workers, the command line and request threads; the asynchronous ones only
for the API's event loop. Every method may raise :class:`StorageUnavailable` and :class:`StorageRefused`, and
every one that writes ``storage_full``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import obstore
from obstore.store import ObjectStore, S3Store

from merging.errors import InputError
from service.storage.blobs import STAGING, Arrival, Blob, blob_key
from service.storage.failures import StorageRefused, StorageUnavailable, meaning
from service.storage.local import Room, linked, to_disk
from service.storage.relay import relayed
from service.storage.stores import open_store

CHUNK = 1 << 20
_PART = 8 << 20
_PARTS_AT_ONCE = 4
_PARTS_OF_STREAM = 2
_WRITE = 1 << 20
_COPY_LIMIT = 5 << 30
"""S3 copies no larger object by itself."""
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """An object: its key, its bytes, and when it was written (seconds since the epoch)."""

    key: str
    size: int
    modified: float


class Storage:
    """An object store. ``root`` is its folder when it is local, which allows links instead of copies.

    ``patience``: so many seconds the synchronous methods wait for a storage that does not answer.
    ``keep_free``: so many bytes streams leave free on the disk of a folder.
    """

    def __init__(
        self, store: ObjectStore, root: Path | None = None, *, patience: float = 0.0, keep_free: int = 0
    ) -> None:
        self._store = store
        self.root = root
        self._room = Room(root, keep_free) if root is not None else None
        self._patience = patience

    @classmethod
    def open(cls, url: str, *, patient: bool = False, keep_free: int = 0) -> Storage:
        """The store at a URL, not contacted yet. A ``patient`` one (workers) bridges an outage of a minute.

        Raises ``storage_url_unsupported``.
        """
        store, root = open_store(url)
        return cls(store, root, patience=_PATIENCE_SECONDS if patient else 0.0, keep_free=keep_free)

    def demand_room(self, size: int) -> None:
        """Raise ``storage_full`` if so many bytes more would fill the disk. A bucket has no end."""
        if self._room:
            self._room.demand(size)

    def check(self) -> None:
        """Ask the storage for something, whether it is there or not."""
        self._do(lambda: next(iter(obstore.list(self._store, "ready", chunk_size=1)), None))

    def require(self) -> None:
        """Raise :class:`InputError` for a storage that will never let us in; one that is away may come."""
        with contextlib.suppress(StorageUnavailable):
            try:
                self.check()
            except StorageRefused as error:
                where = {"field": "MERGANSER_STORAGE_URL"}
                raise InputError(error.code, error.message, remedy=error.remedy, where=where) from None

    def _do(self, act: Callable[[], _T]) -> _T:
        """Run a step that may be repeated; errors get their meaning."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return act()
            except Exception as error:
                found = meaning(error)
                if found is error:
                    raise
                if not isinstance(found, StorageUnavailable) or time.monotonic() >= deadline:
                    raise found from None
            time.sleep(_PAUSE_SECONDS)

    # documents

    def put_json(self, key: str, document: Any) -> None:
        """Write a document atomically, replacing an older one."""
        data = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        self._do(lambda: obstore.put(self._store, key, data))
        self._to_disk(key)

    def get_json(self, key: str) -> Any | None:
        """The document, or None."""
        data = self.get_bytes(key)
        return None if data is None else json.loads(data)

    def get_bytes(self, key: str) -> bytes | None:
        """A small object as a whole, or None."""
        try:
            return self._do(lambda: bytes(obstore.get(self._store, key).bytes()))
        except FileNotFoundError:
            return None

    def first_bytes(self, key: str, count: int) -> bytes:
        """The first bytes of an object, fewer when it is shorter. Raises ``FileNotFoundError``."""

        def read() -> bytes:
            length = min(count, obstore.head(self._store, key)["size"])
            return bytes(obstore.get_range(self._store, key, start=0, length=length)) if length else b""

        return self._do(read)

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of an object in chunks. Raises ``FileNotFoundError``."""
        for chunk in self._do(lambda: obstore.get(self._store, key)).stream(min_chunk_size=CHUNK):
            yield bytes(chunk)

    # files

    def put_file(self, key: str, path: Path) -> None:
        """Store a file that nobody changes afterwards: on the same volume it is linked, not copied."""
        if self.root is None or not linked(path, self.root / key):
            self._do(
                lambda: obstore.put(self._store, key, path, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE)
            )
        self._to_disk(key)

    def fetch(self, key: str, target: Path) -> None:
        """Bring an object to ``target``, which must be treated as read-only: it may be a link."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.root is not None:
            if not linked(self.root / key, target):
                shutil.copyfile(self.root / key, target)
            return

        def bring() -> None:
            with target.open("wb") as file:
                for chunk in obstore.get(self._store, key).stream(min_chunk_size=CHUNK):
                    file.write(chunk)

        try:
            self._do(bring)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def copy(self, key: str, target: str) -> None:
        """Give an object a second key, with the present as its time; the store does it by itself."""
        self._do(lambda: self._copy(key, target))
        self._to_disk(target)

    def _copy(self, key: str, target: str) -> None:
        if self.root is None and obstore.head(self._store, key)["size"] > _COPY_LIMIT:
            content = relayed(lambda: self.chunks(key))
            obstore.put(self._store, target, content, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE)
            return
        obstore.copy(self._store, key, target)
        if self.root is not None:
            os.utime(self.root / target)  # it is a link and has the time of the original

    def size(self, key: str) -> int | None:
        """Bytes of an object, or None when there is no such object."""
        try:
            return self._do(lambda: obstore.head(self._store, key)["size"])
        except FileNotFoundError:
            return None

    def entries(self, prefix: str) -> list[Entry]:
        """The objects below a prefix, sorted by key."""

        def collect() -> list[Entry]:
            return [
                Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())
                for page in obstore.list(self._store, prefix, chunk_size=1000)
                for meta in page
            ]

        return sorted(self._do(collect), key=lambda entry: entry.key)

    def keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        """The keys below a prefix with their sizes, sorted."""
        return ((entry.key, entry.size) for entry in self.entries(prefix))

    def folders(self, prefix: str) -> list[str]:
        """The names one level below a prefix that have something below them, sorted."""
        found = self._do(lambda: obstore.list_with_delimiter(self._store, prefix))
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    def level(self, prefix: str) -> list[str]:
        """The keys one level below a prefix, sorted."""
        found = self._do(lambda: obstore.list_with_delimiter(self._store, prefix))
        return sorted(meta["path"] for meta in found["objects"])

    def delete(self, *keys: str) -> None:
        """Remove objects; their absence is fine."""
        if self.root is None:
            if keys:
                self._do(lambda: obstore.delete(self._store, list(keys)))
            return
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                self._do(lambda key=key: obstore.delete(self._store, key))  # type: ignore[misc]

    def delete_prefix(self, prefix: str) -> None:
        """Remove all objects below a prefix."""
        self.delete(*(key for key, _ in self.keys(prefix)))

    def presigned(self, method: Literal["GET", "HEAD", "PUT"], key: str, seconds: int) -> str | None:
        """A URL with which anyone may do this for a while; None where the store serves nobody but us."""
        if not isinstance(self._store, S3Store):
            return None
        store = self._store
        return self._do(lambda: str(obstore.sign(store, method, key, timedelta(seconds=seconds))))

    def _to_disk(self, key: str) -> None:
        """Make a local object survive a power cut before anything refers to it."""
        if self.root is not None:
            to_disk(self.root / key)

    # streams of the API

    async def put_stream(
        self, tenant: str, chunks: AsyncIterable[bytes], *, limit: int, expect: str | None = None
    ) -> Blob:
        """Store a stream as a blob. Nothing is kept when it is too long, breaks off, or differs.

        ``expect`` is the sha256 (hex) that the content must have. Raises :class:`StreamTooLong` and
        :class:`DigestMismatch`.
        """
        arrival = Arrival(chunks, limit, expect)
        staged = f"{STAGING}/{tenant}/{uuid.uuid4().hex}"
        await self.write_stream(staged, arrival.checked())
        new = await asyncio.to_thread(self._settle, staged, blob_key(tenant, arrival.sha256))
        return Blob(arrival.sha256, arrival.size, new=new)

    async def write_stream(self, key: str, chunks: AsyncIterable[bytes]) -> None:
        """Store a stream under a key, replacing what was there. Nothing is kept of one that raises."""
        content = self._room.metered(chunks) if self._room else aiter(chunks)
        part = _PART if self.root is None else _WRITE  # many streams come at once, and each holds some
        try:
            await obstore.put_async(
                self._store, key, content, chunk_size=part, max_concurrency=_PARTS_OF_STREAM
            )
        except Exception as error:
            found = meaning(error)
            raise (found if found is not error else error) from None

    def _settle(self, staged: str, key: str) -> bool:
        """Give a staged object its final key; whether that is new."""
        new = self.size(key) is None
        self._to_disk(staged)
        try:
            if self.root is not None:
                self._do(lambda: obstore.rename(self._store, staged, key))
                with contextlib.suppress(FileNotFoundError):  # collected again; who refers to it will see
                    self._to_disk(key)
            else:
                self._do(lambda: self._copy(staged, key))
        finally:
            if self.root is None:
                with contextlib.suppress(Exception):  # if it stays, it is collected one day
                    self.delete(staged)
        return new

    def stream(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes ``[start, end)`` of an object in chunks. It is opened now, so that errors come now."""
        if start >= end:
            return _chunks(None)
        return _chunks(self._do(lambda: obstore.get(self._store, key, options={"range": (start, end)})))


async def _chunks(found: obstore.GetResult | None) -> AsyncIterator[bytes]:
    if found is not None:
        async for chunk in found.stream(min_chunk_size=CHUNK):
            yield bytes(chunk)
