"""What only a folder can do: links, and being told to reach the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path

from service.errors import NoSpace

_STEP = 16 << 20


class Room:
    """The free space of a folder's disk, of which ``keep_free`` bytes are not for objects that stream in."""

    def __init__(self, folder: Path, keep_free: int) -> None:
        self._folder = folder
        self._keep_free = keep_free

    def demand(self, size: int) -> None:
        """Raise ``storage_full`` unless there is room for so many bytes more."""
        if self._keep_free and shutil.disk_usage(self._folder).free - max(size, 0) < self._keep_free:
            raise NoSpace(
                "storage_full",
                "the disk of the object storage would become too full",
                remedy="Delete what is not needed, make the disk larger, or lower MERGANSER_MIN_FREE_BYTES",
            )

    async def metered(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """The same chunks, as long as there is room for them."""
        left = 0
        async for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                self.demand(_STEP)
                left = _STEP
            yield chunk


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
