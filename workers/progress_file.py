"""The state of a long adaptation, kept in the storage: whoever takes a merge over goes on from it."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from merging.errors import MergeError
from service.broker import TRANSIENT
from service.documents import attempts_prefix
from service.storage import Storage

NAME = "checkpoint"
_log = logging.getLogger("merganser.task")


class ProgressFile:
    """A file at ``path`` and its copy in the storage, below the attempts of a merge."""

    def __init__(self, storage: Storage, tenant: str, merge_id: str, path: Path) -> None:
        self._storage = storage
        self._key = f"{attempts_prefix(tenant, merge_id)}/{NAME}"
        self.path = path
        self._kept = self._written()

    def bring(self) -> None:
        """Fetch what an earlier attempt left, if it left anything."""
        with suppress(FileNotFoundError):
            self._storage.fetch(self._key, self.path)
        self._kept = self._written()

    def keep(self) -> None:
        """Store the file if it is new. A failure costs only the time of going on from further back."""
        written = self._written()
        if written is None or written == self._kept:
            return
        self._kept = written
        try:
            self._storage.put_file(self._key, self.path)
        except (*TRANSIENT, MergeError, OSError) as error:
            _log.warning("the state of an adaptation was not kept: %s", error)

    def drop(self) -> None:
        """Remove the copy; the merge has ended."""
        self._storage.delete(self._key)

    def _written(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns
