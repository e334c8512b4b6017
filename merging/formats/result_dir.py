"""A result directory that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from merging.errors import InputError

_OLD = ".old"
_PART = r"\.{}\.part-[0-9a-f]{{12}}(?:\.old)?"


class ResultDirectory:
    """Context manager: write into ``.path``; on success it becomes ``out``, on error it vanishes.

    ``path`` is a hidden sibling of ``out``, so that the final step is one rename. It is locked while it
    is in use; siblings that a killed process left behind are removed by the next user of the same
    ``out``. With ``overwrite`` an existing folder is replaced, but only once the new one is complete.
    Raises :class:`InputError` ``output_exists`` at once, before any work is done.
    """

    def __init__(self, out: str | Path, overwrite: bool = False) -> None:
        self.out = Path(os.path.abspath(out))
        self.overwrite = overwrite
        self._handle: int | None = None
        self.path = self.out.with_name(f".{self.out.name}.part-{secrets.token_hex(6)}")

    def __enter__(self) -> Self:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._recover()
        self.check()
        self.path.mkdir()
        self._handle = lock_folder(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            if self.path.exists():
                shutil.rmtree(self.path, ignore_errors=True)
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def check(self) -> None:
        """Raise ``output_exists`` if ``out`` may not be written; for callers with slow work ahead."""
        if not os.path.lexists(self.out):
            return
        if not self.out.is_dir() or (not self.overwrite and any(self.out.iterdir())):
            raise InputError(
                "output_exists",
                f"the output {self.out.name} exists already",
                remedy="Choose another folder, remove it, or ask to overwrite it",
                where={"file": str(self.out)},
            )

    def _publish(self) -> None:
        """Everything on disk first, then the rename, then the rename on disk."""
        for folder, _, files in os.walk(self.path, topdown=False):
            for name in sorted(files):
                _sync(Path(folder, name))
            _sync(Path(folder))
        self.check()
        self._ready()
        old = self.path.with_name(self.path.name + _OLD)
        if self.overwrite and self.out.is_dir():
            self.out.rename(old)
        try:
            self.path.rename(self.out)
        except BaseException:
            if old.exists():
                old.rename(self.out)
            raise
        _sync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _ready(self) -> None:
        """Everything is on disk; the rename comes next."""

    def _recover(self) -> None:
        """Clear up after killed processes: their locks went with them.

        One that died between the two renames of an overwrite left the old result beside ``out``; it is
        put back.
        """
        pattern = _PART.format(re.escape(self.out.name))
        with os.scandir(self.out.parent) as entries:
            names = sorted(entry.name for entry in entries if re.fullmatch(pattern, entry.name))
        for name in names:
            part = self.out.with_name(name.removesuffix(_OLD))
            entry = self.out.with_name(name)
            handle = lock_folder(part)
            if handle is None and part.exists():
                continue
            if entry != part and not self.out.exists():
                with suppress(OSError):
                    entry.rename(self.out)
            elif entry != part or handle is not None:
                shutil.rmtree(entry, ignore_errors=True)
            if handle is not None:
                os.close(handle)


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` for work on it, gone at the end; a killed one's is removed later."""
    holder = ResultDirectory(out, overwrite=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    holder.path.mkdir()
    handle = lock_folder(holder.path)
    try:
        yield holder.path
    finally:
        shutil.rmtree(holder.path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def lock_folder(folder: Path) -> int | None:
    """An exclusive lock on a folder as a handle, or None when it is taken or the folder has gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == folder.stat().st_ino:
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot synchronise a folder
            os.fsync(handle)
    finally:
        os.close(handle)
