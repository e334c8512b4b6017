"""Send a stored file: ranges, validators, checksums (RFC 9110, RFC 9530)."""

from __future__ import annotations

import base64
import re
from pathlib import PurePosixPath
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from service.documents import FileEntry
from service.errors import BadRequest, NotFound, RangeNotSatisfiable
from service.storage import Storage

OTHER_TYPE = "application/octet-stream"
MEDIA_TYPES = {
    ".json": "application/json",
    ".md": "text/markdown",
    ".txt": "text/plain",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}
"""By suffix, the same on every machine; all else is ``OTHER_TYPE``."""
_RANGE = re.compile(r"^(\d{0,20})-(\d{0,20})$", re.ASCII)
_DIGEST = re.compile(r"^\s*sha-256=:([A-Za-z0-9+/=]{44}):\s*$")


def send(request: Request, storage: Storage, key: str, entry: FileEntry) -> Response:
    """The response to GET or HEAD of a file that never changes."""
    etag = f'"{entry.sha256}"'
    name = quote(entry.path.rsplit("/", 1)[-1])
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'",
        "Cache-Control": "private, no-cache",
    }
    if _matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    span = _span(request, entry.size, etag)
    start, end = span or (0, entry.size)
    headers["Content-Length"] = str(end - start)
    headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(entry.sha256)).decode()}:"
    if span:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{entry.size}"
    media_type = MEDIA_TYPES.get(PurePosixPath(entry.path).suffix.lower(), OTHER_TYPE)
    status = 206 if span else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    try:
        chunks = storage.stream(key, start, end)
    except FileNotFoundError:
        raise NotFound(
            "content_missing",
            f"the content of {entry.path} is gone from the storage",
            where={"file": entry.path},
        ) from None
    return StreamingResponse(chunks, status_code=status, headers=headers, media_type=media_type)


def _matches(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or etag in [item.strip().removeprefix("W/") for item in header.split(",")]


def _span(request: Request, size: int, etag: str) -> tuple[int, int] | None:
    """``[start, end)`` of the one range that is asked for; None means the whole file.

    Several ranges and units other than bytes are answered with the whole file, as HTTP allows.
    """
    header = request.headers.get("range")
    if header is None or not header.startswith("bytes="):
        return None
    condition = request.headers.get("if-range")
    if condition is not None and condition.strip() != etag:
        return None
    match = _RANGE.match(header.removeprefix("bytes=").strip())
    if match is None:
        return None
    first, last = match.groups()
    if not first and not last:
        return None
    if not first:
        length = min(int(last), size)
        if length == 0:
            raise RangeNotSatisfiable(size)
        return size - length, size
    start = int(first)
    end = min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable(size)
    return start, end


def promised_sha256(header: str | None) -> str | None:
    """The sha256 (hex) of a ``Content-Digest`` header; other algorithms in it are ignored.

    Raises ``content_digest_invalid``.
    """
    if header is None:
        return None
    items = [item for item in header.split(",") if item.strip().lower().startswith("sha-256=")]
    if not items:
        return None
    match = _DIGEST.match(items[0].strip())
    try:
        digest = base64.b64decode(match.group(1), validate=True) if match else b""
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise BadRequest(
            "content_digest_invalid",
            "the header Content-Digest is malformed",
            remedy="Send Content-Digest: sha-256=:<base64 of the 32 bytes>:",
            where={"field": "Content-Digest"},
        )
    return digest.hex()
