"""What only a folder can do: links, and being told to reach the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

from service.errors import NoSpace

_STEP = 16 << 20


_REMEDY = "Delete what is not needed, make the disk larger, or lower MERGANSER_MIN_FREE_BYTES"


class Room:
    """The free space of a folder's disk, of which ``keep_free`` bytes are not to be used.

    ``scratch``: the folder is for work in progress, and no storage.
    """

    def __init__(self, folder: Path, keep_free: int, *, scratch: bool = False) -> None:
        self._folder = folder
        self._keep_free = keep_free
        self._scratch = scratch

    def demand(self, size: int) -> None:
        """Raise ``storage_full`` or ``scratch_full`` unless there is room for so many bytes more."""
        if self._keep_free and shutil.disk_usage(self._folder).free - max(size, 0) < self._keep_free:
            raise scratch_full() if self._scratch else _storage_full()

    async def metered(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """The same chunks, as long as there is room for them."""
        left = 0
        async for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                self.demand(_STEP)
                left = _STEP
            yield chunk


def scratch_full() -> NoSpace:
    """The error for a full disk of a folder for work in progress."""
    return NoSpace(
        "scratch_full",
        "the disk for work in progress, below MERGANSER_DATA_DIR, would become too full",
        remedy=_REMEDY,
    )


def is_full(error: OSError) -> bool:
    """Whether the error says that a disk, or what may be used of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _storage_full() -> NoSpace:
    return NoSpace("storage_full", "the disk of the object storage would become too full", remedy=_REMEDY)


def linked(source: Path, target: Path) -> bool:
    """Give a file a second name if the file system can; the folder of ``target`` is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another volume, a file system without links, or the name is taken
        return False
    return True


def to_disk(path: Path) -> None:
    """Make a file and its name survive a power cut."""
    for item in (path, path.parent):
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
