"""What the object store's errors mean: codes without addresses, keys or signatures in them."""

from __future__ import annotations

import logging
import re

from obstore import exceptions

from service.errors import NoSpace, Unavailable
from service.storage.local import is_full

_FULL = re.compile(r"\(os error (28|122)\)|\b507 Insufficient")
_DENIED = re.compile(
    r"\b40[13] (Forbidden|Unauthorized)|InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied"
)
_OURS = (
    exceptions.AlreadyExistsError,
    exceptions.PreconditionError,
    exceptions.NotModifiedError,
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
)
_log = logging.getLogger("merganser.storage")


class StorageUnavailable(Unavailable):
    """The storage does not answer, or answers that it cannot; it may a little later."""


class StorageRefused(Unavailable):
    """The storage answers, but not us: a setting is wrong. Asking again does not help."""


def meaning(error: Exception) -> Exception:
    """The error to raise for one of the object store's; what is none of its own is given back."""
    if isinstance(error, OSError):
        if "NoSuchBucket" in str(error):
            return _bucket_missing()
        return _full() if is_full(error) else error
    if not isinstance(error, exceptions.BaseError) or isinstance(error, _OURS):
        return error
    text = str(error).partition("Debug source")[0]
    if "NoSuchBucket" in text:
        return _bucket_missing()
    denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
    if denied or _DENIED.search(text):
        return StorageRefused(
            "storage_denied",
            "the object storage does not let this service in",
            remedy="Check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) and what they may do",
        )
    if _FULL.search(text):
        return _full()
    _log.warning("the storage failed: %s", " ".join(text.split())[:300])
    return StorageUnavailable(
        "storage_unavailable",
        "the object storage cannot be reached at the moment",
        remedy="Try again in a few seconds",
    )


def _bucket_missing() -> StorageRefused:
    return StorageRefused(
        "storage_bucket_missing",
        "the bucket of the object storage does not exist",
        remedy="Create it, or correct MERGANSER_STORAGE_URL",
    )


def _full() -> NoSpace:
    return NoSpace("storage_full", "the object storage is full", remedy="Delete what is not needed any more")
