"""The parts of upload sessions, as objects of their own: received, listed, joined and dropped.

A client may also send them straight to the bucket by presigned URLs, which say nothing of sizes. So what is
there is looked at again, and what is no part of the announced file does not stay.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from service.errors import Conflict, ServiceError, TooLarge
from service.storage import Storage
from service.upload_sessions import Upload, part_key, part_name, parts_prefix

_RENEW_SECONDS = 5.0


class Parts:
    """The parts of all sessions."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def received(self, upload: Upload) -> list[int]:
        """The numbers of the parts that are there as a whole, sorted."""
        if upload.complete:
            return list(range(1, upload.count + 1))
        sizes = self._sizes(upload)
        return [number for number in sorted(sizes) if sizes[number] == upload.length(number)]

    def drop_wrong(self, upload: Upload) -> list[tuple[int, int]]:
        """Remove the parts that have another size than they may have; their numbers and sizes, sorted."""
        sizes = self._sizes(upload)
        wrong = [(number, size) for number, size in sorted(sizes.items()) if size != upload.length(number)]
        if wrong:
            self._storage.delete(*(part_key(upload, number) for number, _ in wrong))
        return wrong

    def drop(self, upload: Upload) -> None:
        """Remove all parts."""
        self._storage.delete_prefix(parts_prefix(upload))

    def demand_all(self, upload: Upload) -> None:
        """Drop wrong parts: ``part_size_mismatch``. Raises ``part_missing`` unless all are there."""
        wrong = self.drop_wrong(upload)
        if wrong:
            number, size = wrong[0]
            raise ServiceError(
                "part_size_mismatch",
                f"part {number} has {upload.length(number)} bytes; {size} came, and were dropped",
                remedy="Send it again",
                where={"field": "number"},
            )
        there = self.received(upload)
        missing = [number for number in range(1, upload.count + 1) if number not in there]
        if missing:
            raise part_missing(missing)

    async def put(
        self, upload: Upload, number: int, chunks: AsyncIterator[bytes], *, expect: str | None = None
    ) -> str:
        """Store a part; its sha256. Nothing is kept of one that breaks off or has a wrong size or digest.

        Raises ``part_number_invalid``, ``upload_complete``, ``part_too_large``, ``part_size_mismatch``,
        ``content_digest_mismatch``.
        """
        where = {"field": "number"}
        if not 1 <= number <= upload.count:
            raise ServiceError(
                "part_number_invalid",
                f"the parts are numbered 1 to {upload.count}, not {number}",
                where=where,
            )
        if upload.complete:
            raise Conflict("upload_complete", f"the upload {upload.id} is complete already")
        length = upload.length(number)
        digest = hashlib.sha256()
        size = 0

        async def checked() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in chunks:
                size += len(chunk)
                if size > length:
                    raise TooLarge(
                        "part_too_large", f"part {number} has {length} bytes, not more", where=where
                    )
                digest.update(chunk)
                if chunk:
                    yield chunk
            if size < length:
                raise ServiceError(
                    "part_size_mismatch", f"part {number} has {length} bytes; {size} came", where=where
                )
            if expect not in (None, digest.hexdigest()):
                raise ServiceError(
                    "content_digest_mismatch",
                    f"part {number} arrived with the sha256 {digest.hexdigest()}, not as promised",
                    remedy="Send it again",
                    where=where,
                )

        await self._storage.write_stream(part_key(upload, number), checked())
        return digest.hexdigest()

    async def joined(self, upload: Upload, renew: Callable[[], Awaitable[None]]) -> AsyncIterator[bytes]:
        """The bytes of all parts, one after the other; ``renew`` is called every few seconds."""
        renewed = time.monotonic()
        for number in range(1, upload.count + 1):
            key = part_key(upload, number)
            part = await asyncio.to_thread(self._storage.stream, key, 0, upload.length(number))
            async for chunk in part:
                yield chunk
                if time.monotonic() - renewed > _RENEW_SECONDS:
                    await renew()
                    renewed = time.monotonic()

    def _sizes(self, upload: Upload) -> dict[int, int]:
        found = {key.rpartition("/")[2]: size for key, size in self._storage.keys(parts_prefix(upload))}
        names = ((number, part_name(number)) for number in range(1, upload.count + 1))
        return {number: found[name] for number, name in names if name in found}


def part_missing(numbers: list[int]) -> Conflict:
    """The error for parts that are not there; none named: one that was there is gone."""
    some = ", ".join(map(str, numbers[:10])) + (" and others" if len(numbers) > 10 else "")
    told = f"the parts {some} are not there" if numbers else "a part is not there any more"
    return Conflict("part_missing", told, remedy="GET the upload: it tells which parts are missing")
