"""Open untrusted paths: regular files only, never blocking on a pipe or a device."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A read handle and the status of a regular file. Raises :class:`OSError` for anything else."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        yield handle, status
    finally:
        os.close(handle)


def read_at(handle: int, count: int, offset: int) -> bytes:
    """Up to ``count`` bytes from ``offset``; fewer only at the end of the file."""
    parts: list[bytes] = []
    while count > 0 and (part := os.pread(handle, count, offset)):
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
