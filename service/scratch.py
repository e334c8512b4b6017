"""Folders for work in progress, each owned by a living process.

A folder belongs to the process that holds the lock on the file in it. Whoever finds it unlocked knows that
its owner is dead and may remove it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "work-"
_LOCK = "owner.lock"
_MOMENT_SECONDS = 5.0
"""A folder has no lock for less than this, while it is made or removed."""


class Scratch:
    """A locked folder below ``root``. Removed by :meth:`close`, or by :func:`sweep` after a crash."""

    def __init__(self, root: Path) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
            try:
                self._handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            if (self.path / _LOCK).exists():  # else it was swept away before it was locked
                return
            os.close(self._handle)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._handle)


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A fresh private folder below ``root``, removed afterwards."""
    owned = Scratch(root)
    try:
        yield owned.path
    finally:
        owned.close()


def _age(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0


def sweep(root: Path) -> int:
    """Remove the folders of dead owners; how many."""
    removed = 0
    for folder in sorted(root.glob(f"{_PREFIX}*")):
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # just being made, or just being removed; unless its owner died right then
            if _age(folder) > _MOMENT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
        finally:
            os.close(handle)
    return removed
