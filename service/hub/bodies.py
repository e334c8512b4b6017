"""Bodies of the Hub's requests: files on their way into the storage, and small JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.bodies import sniffed
from service.deps import Services
from service.errors import BadRequest, ServiceError, TooLarge
from service.storage import Blob, DigestMismatch, StreamTooLong


async def keep(
    services: Services,
    tenant: str,
    chunks: AsyncIterator[bytes],
    *,
    limit: int,
    announced: int = 0,
    expect: str | None = None,
    name: str = "a file of the commit",
) -> Blob:
    """Store a file within the tenant's quota.

    Raises ``file_too_large``, ``content_digest_mismatch``, ``quota_exceeded``, and the refusals of foreign
    formats.
    """
    try:
        async with services.quota.grant(tenant, announced) as grant:
            metered = grant.metered(sniffed(chunks, name))
            blob = await services.storage.put_stream(tenant, metered, limit=limit, expect=expect)
            grant.kept = blob.size if blob.new else 0
            return blob
    except StreamTooLong as error:
        raise TooLarge("file_too_large", f"{name} has more than {limit} bytes") from error
    except DigestMismatch as error:
        raise ServiceError(
            "content_digest_mismatch",
            f"{name} arrived with the sha256 {error.actual}, not {error.expected}",
            remedy="Send it again",
        ) from error
    except ClientDisconnect as error:
        raise BadRequest("upload_interrupted", f"the upload of {name} broke off") from error


def parse(data: bytes) -> Any:
    """JSON whose texts can be written as UTF-8. Raises ``ValueError``.

    The escapes of JSON can name half of a surrogate pair, which no file name and no answer can hold.
    """
    try:
        parsed = json.loads(data)
        json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("the JSON is too deep") from None
    return parsed


async def json_object(request: Request) -> dict[str, Any]:
    """A body that is a JSON object, whatever media type it claims. Raises ``body_not_json``."""
    try:
        data = parse(await request.body())
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise BadRequest("body_not_json", "the body is not a JSON object")
    return data
