"""The header of a safetensors file, parsed and checked rule by rule.

The grammar is narrow (``{"__metadata__": {...}, name: {dtype, shape, data_offsets}, ...}``), so one cursor
walks over the entries and stops at the first that is wrong: time is linear, memory bounded by the limits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from merging.errors import InputError

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of every dtype that is accepted; the sub-byte and complex ones are not."""

_WS = rb"[ \t\r\n]*+"
_KEY = re.compile(_WS + rb'"([^"\\]*+)"' + _WS + rb":" + _WS)
_ENTRY = re.compile(rb"(\{[^{}]*+\})" + _WS + rb"([,}])")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SEPARATOR = re.compile(_WS + rb"([,}])")
_SPACE = re.compile(_WS)
_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.\-]*+\Z")
_ENTRY_BYTES = 1024
_INTEGER_DIGITS = 19
_COPY = "The file is damaged or incomplete: copy or download it again"
_REMEDIES = {
    "truncated": _COPY,
    "trailing": _COPY,
    "too_small": _COPY,
    "not_a_file": "Put the file itself there",
    "name": "Rename the tensors as the trainer's own export names them",
    "dtype": "Save the tensors in a floating or integer dtype of whole bytes",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a safetensors header may ask for."""

    header_bytes: int = 25 << 20
    tensors: int = 50_000
    dims: int = 8
    name_bytes: int = 512
    metadata_entries: int = 10_000
    file_bytes: int | None = None


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; ``begin`` and ``end`` count bytes from the start of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in file order, string metadata, where the data starts, the file size.

    ``identity`` is (device, inode, size, mtime in ns) of the file that was checked, so that a later
    reader can tell that it reads the same file.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    size: int
    identity: tuple[int, int, int, int] = field(default=(0, 0, 0, 0), compare=False)


class _Duplicate(ValueError):
    """A JSON object states a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Duplicate
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> int:
    if len(text) > _INTEGER_DIGITS:
        raise ValueError("a number has too many digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)


class HeaderCheck:
    """The rules, for one file."""

    def __init__(self, file: str, limits: Limits) -> None:
        self.file = file
        self.limits = limits

    def fail(self, rule: str, what: str, *, tensor: str | None = None) -> NoReturn:
        where = {"file": self.file}
        subject = f"{self.file}"
        if tensor is not None:
            where["tensor"] = tensor
            subject = f"{self.file}: tensor {tensor}"
        raise InputError(
            f"safetensors_{rule}",
            f"{subject} {what}",
            remedy=_REMEDIES.get(rule, "Write the file again with the safetensors library"),
            where=where,
        ) from None

    def header(self, raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """Parse ``{"__metadata__": {...}, name: {dtype, shape, data_offsets}, ...}``."""
        if raw[:1] != b"{":
            self.fail("header_not_json", "has a header that does not start with '{'")
        # A field name cannot stand in a string with both its quotes, so this bounds the entries at once.
        if raw.count(b'"data_offsets"') > self.limits.tensors + self.limits.metadata_entries:
            self._too_many()
        tensors: dict[str, TensorInfo] = {}
        metadata: dict[str, str] | None = None
        position = _after_space(raw, 1)
        if raw[position : position + 1] == b"}":
            self.fail("no_tensors", "holds no tensors")
        mark = b","
        position = 1
        while mark == b",":
            key = _KEY.match(raw, position)
            if key is None:
                self._bad_key(raw, position)
            if key[1] == b"__metadata__":
                if metadata is not None:
                    self.fail("duplicate_key", "states __metadata__ twice")
                metadata, position = self._metadata(raw, key.end())
                separator = _SEPARATOR.match(raw, position)
                if separator is None:
                    self._not_json(position)
                mark, position = separator[1], separator.end()
                continue
            name = self._name(key[1])
            if name in tensors:
                self.fail("duplicate_key", "is stated twice in the header", tensor=name)
            if len(tensors) >= self.limits.tensors:
                self._too_many()
            entry = _ENTRY.match(raw, key.end())
            if entry is None:
                self._not_json(key.end())
            tensors[name] = self._tensor(name, entry[1])
            mark, position = entry[2], entry.end()
        if _after_space(raw, position) != len(raw):
            self.fail("header_not_json", "has text after the end of its header")
        if not tensors:
            self.fail("no_tensors", "holds no tensors")
        return tensors, metadata or {}

    def _too_many(self) -> NoReturn:
        self.fail("too_many_tensors", f"holds more than {self.limits.tensors} tensors")

    def _not_json(self, position: int) -> NoReturn:
        self.fail("header_not_json", f"has a header that is not valid at byte {position}")

    def _bad_key(self, raw: bytes, position: int) -> NoReturn:
        start = _after_space(raw, position)
        key = _STRING.match(raw, start)
        if key is not None and b"\\" in key[0]:
            self.fail("name", "has a tensor name with an escaped character")
        self._not_json(start)

    def _name(self, raw: bytes) -> str:
        limit = self.limits.name_bytes
        if len(raw) > limit:
            self.fail("name", f"has a tensor name of {len(raw)} bytes, the limit is {limit}")
        if not _NAME.match(raw) or b".." in raw:
            shown = raw[:80].decode("ascii", "backslashreplace")
            self.fail("name", f"has the tensor name {shown!r}; letters, digits, _ - and "
                      "single dots are accepted")  # fmt: skip
        return raw.decode("ascii")

    def _metadata(self, raw: bytes, position: int) -> tuple[dict[str, str], int]:
        if raw[position : position + 1] != b"{":
            self.fail("metadata", "has metadata that is not an object of strings")
        position = _after_space(raw, position + 1)
        if raw[position : position + 1] == b"}":
            return {}, position + 1
        values: dict[str, str] = {}
        mark = b","
        while mark == b",":
            key, position = self._string(raw, _after_space(raw, position))
            position = _after_space(raw, position)
            if raw[position : position + 1] != b":":
                self._not_json(position)
            value, position = self._string(raw, _after_space(raw, position + 1))
            if key in values:
                self.fail("duplicate_key", f"states the metadata key {key[:80]!r} twice")
            values[key] = value
            if len(values) > self.limits.metadata_entries:
                self.fail("metadata", "has too many metadata entries")
            separator = _SEPARATOR.match(raw, position)
            if separator is None:
                self._not_json(position)
            mark, position = separator[1], separator.end()
        return values, position

    def _string(self, raw: bytes, position: int) -> tuple[str, int]:
        token = _STRING.match(raw, position)
        if token is None:
            self.fail("metadata", "has metadata that is not an object of strings")
        try:
            text: str = json.loads(token[0])
            text.encode()  # a lone surrogate could never be written back
        except ValueError:
            self.fail("header_not_json", f"has a string that is not valid at byte {position}")
        return text, token.end()

    def _tensor(self, name: str, raw: bytes) -> TensorInfo:
        if len(raw) > _ENTRY_BYTES:
            self.fail("header_entry", "has an overlong header entry", tensor=name)
        try:
            entry = _DECODER.decode(raw.decode())
        except _Duplicate:
            self.fail("duplicate_key", "states a field twice", tensor=name)
        except (ValueError, RecursionError):
            self.fail("header_not_json", "has a header entry that is not valid JSON", tensor=name)
        unknown = [key for key in entry if key not in ("dtype", "shape", "data_offsets")]
        if unknown:
            self.fail("unknown_field", f"has the unknown field {unknown[0][:80]!r}", tensor=name)
        if len(entry) != 3:
            self.fail("missing_field", "needs dtype, shape and data_offsets", tensor=name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            self.fail("dtype", f"has the unsupported dtype {str(dtype)[:40]!r}", tensor=name)
        if not _naturals(shape):
            self.fail("shape", "has a shape that is not a list of sizes", tensor=name)
        if len(shape) > self.limits.dims:
            self.fail("shape", f"has {len(shape)} dimensions, the limit is {self.limits.dims}",
                      tensor=name)  # fmt: skip
        if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self.fail("offsets", "has data_offsets that are not two ordered offsets", tensor=name)
        begin, end = offsets
        if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
            self.fail("shape", f"has shape {shape} of {dtype}, which is not the {end - begin} bytes "
                      "that its offsets give it", tensor=name)  # fmt: skip
        return TensorInfo(dtype, tuple(shape), begin, end)

    def layout(self, tensors: Mapping[str, TensorInfo], data_bytes: int) -> None:
        """The tensors must tile the data section exactly: no overlap, no hole, nothing behind."""
        reached = 0
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin < reached:
                self.fail("overlap", "shares bytes with another tensor", tensor=name)
            if info.end > data_bytes:
                self.fail("truncated", f"ends at byte {info.end} of {data_bytes}", tensor=name)
            if info.begin > reached:
                self.fail("hole", f"leaves {info.begin - reached} unused bytes before it", tensor=name)
            reached = info.end
        if reached != data_bytes:
            self.fail("trailing", f"has {data_bytes - reached} bytes after its last tensor")


def _after_space(raw: bytes, position: int) -> int:
    match = _SPACE.match(raw, position)
    return match.end() if match else position


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
