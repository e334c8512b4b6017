"""Objects by their keys: small documents, listings and deletion, over a local folder or a bucket.

Every method may raise :class:`StorageUnavailable` and :class:`StorageRefused`, and every one that writes
``storage_full``.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import obstore
from obstore.store import ObjectStore, S3Store

from merging.errors import InputError
from service.storage.failures import StorageRefused, StorageUnavailable, meaning
from service.storage.local import Room, to_disk
from service.storage.stores import open_store

CHUNK = 1 << 20
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Entry:
    """An object: its key, its bytes, and when it was written (seconds since the epoch)."""

    key: str
    size: int
    modified: float


class Objects:
    """An object store. ``root`` is its folder when it is local, which allows links instead of copies.

    ``patience``: so many seconds the synchronous methods wait for a storage that does not answer.
    ``keep_free``: so many bytes what is written leaves free on the disk of a folder, documents excepted.
    """

    def __init__(
        self, store: ObjectStore, root: Path | None = None, *, patience: float = 0.0, keep_free: int = 0
    ) -> None:
        self._store = store
        self.root = root
        self._keep_free = keep_free
        self._room = Room(root, keep_free) if root is not None else None
        self._patience = patience

    @classmethod
    def open(cls, url: str, *, patient: bool = False, keep_free: int = 0) -> Self:
        """The store at a URL, not contacted yet. A ``patient`` one (workers) bridges an outage of a minute.

        Raises ``storage_url_unsupported``.
        """
        store, root = open_store(url)
        return cls(store, root, patience=_PATIENCE_SECONDS if patient else 0.0, keep_free=keep_free)

    def demand_room(self, size: int) -> None:
        """Raise ``storage_full`` if so many bytes more would fill the disk. A bucket has no end."""
        if self._room:
            self._room.demand(size)

    def demand_scratch(self, folder: Path, size: int = 0) -> None:
        """Raise ``scratch_full`` if so many bytes more would fill the disk of a folder for work."""
        Room(folder, self._keep_free, scratch=True).demand(size)

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
                if not isinstance(found, StorageUnavailable) or time.monotonic() >= deadline:
                    if found is error:
                        raise
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
        stream = iter(self._do(lambda: obstore.get(self._store, key)).stream(min_chunk_size=CHUNK))
        while True:
            try:
                chunk = next(stream)
            except StopIteration:
                return
            except Exception as error:
                found = meaning(error)
                if found is error:
                    raise
                raise found from None
            yield bytes(chunk)

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
