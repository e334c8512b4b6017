"""The guard in front of every safetensors file.

An uploaded file is parsed here, with our own bounded parser, before any library sees a byte of it. The
safetensors format (https://huggingface.co/docs/safetensors) is an 8-byte little-endian header length, a
JSON header, and the raw tensor bytes. The official parser accepts several things that a service must not:
duplicate keys (the last one wins), any tensor name, any number of tensors and dimensions. Each rule here
has one stable code. Nothing in this module imports torch or safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path

from merging.formats.files import open_regular, read_at
from merging.formats.header import DEFAULT_LIMITS, ITEM_BYTES, Header, HeaderCheck, Limits, TensorInfo
from merging.formats.sniff import refuse_foreign

__all__ = [
    "DEFAULT_LIMITS",
    "ITEM_BYTES",
    "Header",
    "Limits",
    "TensorInfo",
    "check_safetensors",
    "file_identity",
]


def file_identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What must stay the same between checking a file and reading it."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def check_safetensors(path: str | Path, *, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Check a safetensors file and return its header. No tensor data is read.

    Time is linear in the header, memory a small multiple of it. Raises :class:`InputError` with a
    ``safetensors_*`` code, or ``pickle_not_accepted`` and its like when the content is something else.
    """
    path = Path(path)
    check = HeaderCheck(path.name, limits)
    try:
        with open_regular(path) as (handle, status):
            size = status.st_size
            if limits.file_bytes is not None and size > limits.file_bytes:
                check.fail("file_too_large", f"has {size} bytes, the limit is {limits.file_bytes}")
            head = read_at(handle, 512, 0)
            refuse_foreign(head, check.file)
            length = _header_length(check, head, size)
            raw = read_at(handle, length, 8)
    except OSError as error:
        check.fail("not_a_file", f"cannot be read ({error.strerror})")
    if len(raw) != length:
        check.fail("truncated", "ended while its header was read")
    tensors, metadata = check.header(raw)
    check.layout(tensors, size - 8 - length)
    return Header(tensors, metadata, 8 + length, size, file_identity(status))


def _header_length(check: HeaderCheck, head: bytes, size: int) -> int:
    if len(head) < 10:
        check.fail("too_small", f"has only {len(head)} bytes")
    length = int.from_bytes(head[:8], "little")
    limit = check.limits.header_bytes
    if length > limit:
        if head[8:9] != b"{":
            check.fail("magic", "is not a safetensors file")
        check.fail("header_too_large", f"has a header of {length} bytes, the limit is {limit}")
    if length < 2 or 8 + length > size:
        check.fail("header_length", f"states a header of {length} bytes in a file of {size}")
    return length
