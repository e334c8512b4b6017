"""Object storage: immutable blobs named by their content, and small JSON documents."""

from service.storage.blobs import Blob, DigestMismatch, StreamTooLong, blob_key
from service.storage.failures import StorageRefused, StorageUnavailable
from service.storage.files import Storage
from service.storage.local import is_full, scratch_full
from service.storage.objects import Entry

__all__ = [
    "Blob",
    "DigestMismatch",
    "Entry",
    "Storage",
    "StorageRefused",
    "StorageUnavailable",
    "StreamTooLong",
    "blob_key",
    "is_full",
    "scratch_full",
]
