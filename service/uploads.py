"""Uploads in parts: big files, sent in any order and in parallel, that go on where they broke off.

A session announces model, path, size and sha256 of one file, and its id follows from these: whoever announces
the same again goes on with what is there. Its parts are objects of their own, which the store itself lists.
``complete`` streams them into one blob, checked by size and sha256, and stages that as a plain upload would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import LockError

from merging.formats.sniff import refuse_foreign
from service.broker import staging_key, text
from service.clock import at, millis, now
from service.errors import Conflict, Gone, NotFound, ServiceError, TooLarge
from service.names import check_model, check_path, size_limit
from service.quota import Reservations
from service.registry import Registry
from service.storage import Blob, DigestMismatch, Storage, StreamTooLong, blob_key
from service.upload_parts import Parts, part_missing
from service.upload_sessions import (
    MAX_PARTS,
    PART_BYTES,
    SESSIONS,
    Upload,
    id_of,
    is_over,
    part_key,
    parts_prefix,
    session_key,
)

_HEAD = 512
_LOCK_SECONDS = 30


class BusyUpload(Conflict):
    """Another request is completing the session."""

    headers = {"Retry-After": "2"}  # noqa: RUF012


class Uploads:
    """The sessions of all tenants. Every method takes the tenant first, or a session that belongs to one."""

    def __init__(
        self,
        storage: Storage,
        connection: redis.Redis,
        events: AsyncRedis,
        registry: Registry,
        *,
        tenant_limit: int,
        file_limit: int,
        seconds: int,
    ) -> None:
        self.parts = Parts(storage)
        self._storage = storage
        self._redis = connection
        self._events = events
        self._registry = registry
        self._reservations = Reservations(connection, tenant_limit)
        self._file_limit = file_limit
        self._seconds = seconds

    def open(
        self,
        tenant: str,
        *,
        size: int,
        sha256: str,
        model: str | None = None,
        path: str | None = None,
        part_size: int | None = None,
    ) -> tuple[Upload, bool]:
        """The session of a file, and whether it is a new one. Room for the whole file is reserved.

        An open session keeps its size of parts. Raises ``name_*``, ``path_invalid`` and the like,
        ``file_too_large``, ``quota_exceeded``, ``storage_full``.
        """
        limit = self._file_limit
        if path is not None:
            limit = size_limit(check_path(path), limit)
        if model is not None:
            ns, _, name = model.partition("/")
            check_model(ns, name)
        if size > limit:
            raise TooLarge("file_too_large", f"{path or 'the file'} has more than {limit} bytes")
        upload_id = id_of(tenant, model, path, size, sha256)
        held = self._load(tenant, upload_id)
        if held is not None and not is_over(held, time.time()) and (not held.complete or self._usable(held)):
            return held, False
        if held is not None:
            _remove(self._storage, self._reservations, held)
        moment = now()
        upload = Upload(
            id=upload_id,
            tenant=tenant,
            model=model,
            path=path,
            size=size,
            sha256=sha256,
            part_size=max(part_size or PART_BYTES, -(-size // MAX_PARTS)),
            created_at=moment,
            expires_at=at(millis(moment) + self._seconds * 1000),
        )
        self._storage.demand_room(size)
        if not self._reservations.reserve(tenant, upload_id, size):
            raise TooLarge(
                "quota_exceeded",
                "the upload does not fit into what this tenant may store",
                remedy="Delete what is not needed, or raise MERGANSER_MAX_TENANT_BYTES",
            )
        self._save(upload)
        return upload, True

    def get(self, tenant: str, upload_id: str) -> Upload:
        """A session. Raises ``upload_not_found``, ``upload_expired``."""
        found = self._load(tenant, upload_id)
        if found is None:
            raise NotFound("upload_not_found", f"there is no upload {upload_id}")
        if is_over(found, time.time()):
            raise Gone("upload_expired", f"the upload {upload_id} has expired", remedy="Start it anew")
        return found

    async def complete(self, upload: Upload) -> Upload:
        """Make the parts one file of the next revision; again is fine.

        Raises ``part_missing``, ``part_size_mismatch`` and ``upload_digest_mismatch`` (such parts are then
        dropped), the refusals of foreign formats, and ``upload_busy``.
        """
        async with self._alone(upload) as renew:
            upload = await asyncio.to_thread(self.get, upload.tenant, upload.id)
            if upload.complete:
                return upload
            await asyncio.to_thread(self.parts.demand_all, upload)
            head = await asyncio.to_thread(self._storage.first_bytes, part_key(upload, 1), _HEAD)
            refuse_foreign(head, upload.name)
            try:
                blob = await self._storage.put_stream(
                    upload.tenant, self.parts.joined(upload, renew), limit=upload.size, expect=upload.sha256
                )
            except FileNotFoundError:
                raise part_missing([]) from None
            except (DigestMismatch, StreamTooLong):
                await asyncio.to_thread(self.parts.drop, upload)
                raise ServiceError(
                    "upload_digest_mismatch",
                    f"{upload.name} has another sha256 than was announced; its parts were dropped",
                    remedy="Send the parts again, or announce the file as it is now",
                ) from None
            return await asyncio.to_thread(self._settle, upload, blob)

    def _settle(self, upload: Upload, blob: Blob) -> Upload:
        if upload.model is not None and upload.path is not None:
            self._registry.stage(upload.tenant, upload.model, upload.path, blob)
        done = upload.model_copy(update={"complete": True})
        self._save(done)
        self._reservations.settle(upload.tenant, upload.id, kept=blob.size if blob.new else 0)
        self.parts.drop(upload)
        return done

    async def abort(self, upload: Upload) -> None:
        """End a session and drop its parts. A file that it has staged stays. Raises ``upload_busy``."""
        async with self._alone(upload):
            await asyncio.to_thread(_remove, self._storage, self._reservations, upload)

    @contextlib.asynccontextmanager
    async def _alone(self, upload: Upload) -> AsyncIterator[Any]:
        name = f"mg:{upload.tenant}:upload:{upload.id}:lock"
        lock = self._events.lock(name, timeout=_LOCK_SECONDS, blocking=False)
        if not await lock.acquire():
            raise BusyUpload(
                "upload_busy", f"the upload {upload.id} is being completed", remedy="Ask again in a moment"
            )

        async def renew() -> None:
            with contextlib.suppress(LockError):  # doing it twice does no harm
                await lock.reacquire()

        try:
            yield renew
        finally:
            with contextlib.suppress(LockError):
                await lock.release()

    def _usable(self, upload: Upload) -> bool:
        """Whether what a complete session brought is still where it was put."""
        if upload.model is None or upload.path is None:
            return self._storage.size(blob_key(upload.tenant, upload.sha256)) == upload.size
        staged = self._redis.hget(staging_key(upload.tenant, upload.model), upload.path)
        return staged is not None and json.loads(text(staged)) == [upload.sha256, upload.size]

    def _save(self, upload: Upload) -> None:
        self._storage.put_json(session_key(upload.tenant, upload.id), upload.model_dump(mode="json"))

    def _load(self, tenant: str, upload_id: str) -> Upload | None:
        data = self._storage.get_json(session_key(tenant, upload_id))
        return None if data is None else Upload.model_validate(data)


def expired(storage: Storage, connection: redis.Redis, moment: float) -> list[str]:
    """Remove the sessions of all tenants that have expired at ``moment`` (seconds since the epoch).

    Their parts go and what was reserved for them is given back. The ids of the removed ones, sorted. Of the
    others those parts go that were sent to a bucket and are larger or smaller than announced.
    """
    reservations = Reservations(connection, 0)
    parts = Parts(storage)
    gone: list[str] = []
    for key, _ in storage.keys(SESSIONS):
        data = storage.get_json(key)
        if data is None:
            continue
        upload = Upload.model_validate(data)
        if is_over(upload, moment):
            _remove(storage, reservations, upload)
            gone.append(upload.id)
        elif not upload.complete:
            parts.drop_wrong(upload)
    return sorted(gone)


def _remove(storage: Storage, reservations: Reservations, upload: Upload) -> None:
    storage.delete_prefix(parts_prefix(upload))
    storage.delete(session_key(upload.tenant, upload.id))
    reservations.settle(upload.tenant, upload.id, kept=0)
