"""The storage as the service uses it: objects, and files and streams that go in and out.

The synchronous methods are for workers, the command line and request threads; the asynchronous ones only
for the API's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

import obstore

from service.storage.blobs import STAGING, Arrival, Blob, blob_key
from service.storage.failures import meaning
from service.storage.local import is_full, linked, scratch_full
from service.storage.objects import CHUNK, Objects
from service.storage.relay import relayed

_PART = 8 << 20
_PARTS_AT_ONCE = 4
_PARTS_OF_STREAM = 2
_WRITE = 1 << 20
_COPY_LIMIT = 5 << 30
"""S3 copies no larger object by itself."""


class Storage(Objects):
    """An object store with files and streams."""

    # files

    def put_file(self, key: str, path: Path) -> None:
        """Store a file that nobody changes afterwards: on the same volume it is linked, not copied."""
        if self.root is None or not linked(path, self.root / key):
            self.demand_room(path.stat().st_size)
            self._do(
                lambda: obstore.put(self._store, key, path, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE)
            )
        self._to_disk(key)

    def fetch(self, key: str, target: Path) -> None:
        """Bring an object to ``target``, which must be treated as read-only: it may be a link.

        Raises ``scratch_full``.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.root is not None:
            if not linked(self.root / key, target):
                self.demand_scratch(target.parent, (self.root / key).stat().st_size)
                shutil.copyfile(self.root / key, target)
            return

        def bring() -> None:
            found = obstore.get(self._store, key)
            self.demand_scratch(target.parent, found.meta["size"])
            with target.open("wb") as file:
                for chunk in found.stream(min_chunk_size=CHUNK):
                    try:
                        file.write(chunk)
                    except OSError as error:
                        raise (scratch_full() if is_full(error) else error) from None

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
