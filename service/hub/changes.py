"""What a commit changes: files added and removed, one after the other, on top of the newest revision."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from service.documents import FileEntry
from service.errors import BadRequest, ServiceError, TooLarge
from service.hub.errors import Missing
from service.hub.ndjson import Line
from service.names import REVISION_PATTERN, check_path
from service.storage import Blob

MAX_OPERATIONS = 4000
_SHA256 = re.compile(r"^[0-9a-f]{64}$")

Find = Callable[[str, str], FileEntry]
"""The entry of a path whose content was uploaded before under a sha256."""


@dataclass
class Change:
    """The operations of one commit, in their order. ``parent`` is the revision they were made for."""

    parent: str | None = None
    summary: str = ""
    _steps: list[tuple[str, str, Any]] = field(default_factory=list)

    def take(self, line: Line) -> None:
        """Add what a line asks for. Raises ``commit_malformed``, ``commit_too_long`` and errors of paths."""
        if line.key == "header":
            self._header(line.value)
            return
        path = line.value.get("path")
        if not isinstance(path, str):
            raise BadRequest("commit_malformed", f"the operation {line.key[:40]!r} names no path")
        path = path.removeprefix("./")
        if line.key == "file":
            if line.value.get("encoding") != "base64":
                raise BadRequest("commit_malformed", f"the content of {path[:255]} is not marked as base64")
            self._step("add", check_path(path), line.blob)
        elif line.key == "lfsFile":
            oid = line.value.get("oid")
            if line.value.get("algo", "sha256") != "sha256" or not _SHA256.fullmatch(str(oid)):
                raise BadRequest("commit_malformed", f"{path[:255]} is not named by a sha256")
            self._step("link", check_path(path), oid)
        elif line.key in ("deletedFile", "deletedFolder"):
            self._step(line.key, path.strip("/"), None)
        else:
            raise BadRequest("commit_malformed", f"the operation {line.key[:40]!r} is unknown")

    def _header(self, value: dict[str, Any]) -> None:
        parent = value.get("parentCommit")
        if parent is not None and not (isinstance(parent, str) and re.fullmatch(REVISION_PATTERN, parent)):
            raise BadRequest("commit_malformed", "parentCommit is not a commit")
        self.parent = parent
        self.summary = str(value.get("summary", ""))[:200]

    def _step(self, what: str, path: str, content: Any) -> None:
        if len(self._steps) >= MAX_OPERATIONS:
            raise TooLarge("commit_too_long", f"a commit has at most {MAX_OPERATIONS} operations")
        self._steps.append((what, path, content))

    def apply(self, files: tuple[FileEntry, ...], find: Find) -> tuple[FileEntry, ...]:
        """The files after the change, sorted. Raises :class:`Missing` for a path that cannot be removed."""
        after = {entry.path: entry for entry in files}
        for what, path, content in self._steps:
            if what == "add":
                assert isinstance(content, Blob)
                after[path] = FileEntry(path=path, sha256=content.sha256, size=content.size)
            elif what == "link":
                after[path] = find(path, content)
            elif what == "deletedFile":
                if after.pop(path, None) is None:
                    raise _nothing(path)
            else:
                inside = [name for name in after if not path or name.startswith(f"{path}/")]
                if not inside:
                    raise _nothing(path)
                for name in inside:
                    del after[name]
        return tuple(after[path] for path in sorted(after))


def _nothing(path: str) -> Missing:
    return Missing("EntryNotFound", "file_not_found", f"A file with this name doesn't exist: {path[:255]}")


def not_uploaded(path: str, sha256: str) -> ServiceError:
    """The error for a file whose content never arrived."""
    return ServiceError(
        "content_not_uploaded",
        f"the content {sha256} of {path} was not uploaded before the commit",
        remedy="Upload it with the LFS batch API first",
        where={"file": path},
    )
