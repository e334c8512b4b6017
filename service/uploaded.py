"""Content that was sent before under any name, as a file of a revision."""

from __future__ import annotations

from merging.formats.sniff import refuse_foreign
from service.bodies import HEAD
from service.documents import FileEntry
from service.errors import TooLarge
from service.names import check_path, size_limit
from service.storage import Storage, blob_key


def uploaded(storage: Storage, tenant: str, path: str, sha256: str, limit: int) -> FileEntry | None:
    """The file at ``path`` with this content, or None if a tenant has no such content.

    ``limit``: most bytes of weights. Raises ``file_too_large``, the refusals of names and of foreign formats.
    """
    key = blob_key(tenant, sha256)
    size = storage.size(key)
    if size is None:
        return None
    allowed = size_limit(check_path(path), limit)
    if size > allowed:
        raise TooLarge("file_too_large", f"{path} has more than {allowed} bytes", where={"file": path})
    refuse_foreign(storage.first_bytes(key, HEAD), path)
    return FileEntry(path=path, sha256=sha256, size=size)
