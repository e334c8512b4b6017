"""Sessions of uploads in parts: what they say, and where they and their parts lie in storage."""

from __future__ import annotations

import hashlib
import json

from service.clock import millis
from service.documents import Document, FileEntry

UPLOAD_ID_PATTERN = r"^upl_[0-9a-f]{32}$"
PART_BYTES = 16 << 20
MAX_PARTS = 1000
SESSIONS = "uploads"
"""The folder of all sessions."""


class Upload(Document):
    """A session: what was announced, and whether it is complete."""

    id: str
    tenant: str
    model: str | None
    """None: the content is kept, and staged for no model."""
    path: str | None
    size: int
    sha256: str
    part_size: int
    created_at: str
    expires_at: str
    complete: bool = False

    @property
    def count(self) -> int:
        """How many parts there are, numbered from 1."""
        return -(-self.size // self.part_size)

    def length(self, number: int) -> int:
        """The bytes of a part: ``part_size``, less for the last one."""
        return min(self.part_size, self.size - (number - 1) * self.part_size)

    @property
    def name(self) -> str:
        """What to call the file in a message."""
        return self.path or self.sha256


def entry(upload: Upload) -> FileEntry:
    """The file that a session brings."""
    return FileEntry(path=upload.name, sha256=upload.sha256, size=upload.size)


def part_key(upload: Upload, number: int) -> str:
    """Where a part lies."""
    return f"{parts_prefix(upload)}/{part_name(number)}"


def part_name(number: int) -> str:
    """The last part of the key of a part."""
    return f"{number:05d}"


def parts_prefix(upload: Upload) -> str:
    """Where the parts of a session lie."""
    return f"staging/{upload.tenant}/{upload.id}"


def session_key(tenant: str, upload_id: str) -> str:
    """Where a session lies."""
    return f"{SESSIONS}/{tenant}/{upload_id}.json"


def id_of(tenant: str, model: str | None, path: str | None, size: int, sha256: str) -> str:
    """The id of the session of a file."""
    announced = json.dumps([tenant, model, path, size, sha256])
    return f"upl_{hashlib.sha256(announced.encode()).hexdigest()[:32]}"


def is_over(upload: Upload, moment: float) -> bool:
    """Whether a session has expired at a moment (seconds since the epoch)."""
    return millis(upload.expires_at) <= moment * 1000
