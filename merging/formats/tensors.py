"""Read single tensors of a checked safetensors file.

Plain positioned reads rather than a memory map: a map of a file that is cut short kills the process with
SIGBUS, a read only comes back short. The offsets are those that the guard has checked, and the file must
still be the one that it checked.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from merging.errors import MergeFailure
from merging.formats.guard import Header, TensorInfo, file_identity

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
"""The torch dtype (by name) of each safetensors dtype."""
_STRUCT_CODES = {
    "F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b",
    "U64": "Q", "U32": "I", "U16": "H", "U8": "B",
}  # fmt: skip


class TensorFile:
    """A checked safetensors file, opened on first use. Safe to use from several threads."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self._handle: int | None = None
        self._lock = threading.Lock()

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor under ``key`` on the CPU, in the dtype of the file."""
        import torch

        info = self.header.tensors[key]
        raw = torch.empty(info.end - info.begin, dtype=torch.uint8)
        if len(raw):
            self._read_into(raw.numpy().data, info)
        return raw.view(getattr(torch, TORCH_NAMES[info.dtype])).reshape(info.shape)

    def read_into(self, key: str, view: memoryview, start: int = 0) -> None:
        """Fill ``view`` with the bytes of the tensor under ``key``, from its byte ``start`` on."""
        info = self.header.tensors[key]
        if start < 0 or start + len(view) > info.end - info.begin:
            raise ValueError(f"{key} has no bytes {start}..{start + len(view)}")
        self._fill(view, self.header.data_start + info.begin + start)

    def raw(self, key: str) -> bytes:
        """The bytes of a (small) tensor; needs no torch."""
        info = self.header.tensors[key]
        data = bytearray(info.end - info.begin)
        self._read_into(memoryview(data), info)
        return bytes(data)

    def number(self, key: str) -> float:
        """The value of a tensor of one element; needs no torch. Raises :class:`ValueError` for others."""
        info = self.header.tensors[key]
        if math.prod(info.shape) != 1 or len(info.shape) > 1:
            raise ValueError(f"a tensor of shape {info.shape}")
        data = self.raw(key)
        if info.dtype == "BF16":  # the upper half of a float32
            data, code = bytes(2) + data, "f"
        elif info.dtype in _STRUCT_CODES:
            code = _STRUCT_CODES[info.dtype]
        else:
            raise ValueError(f"a tensor of dtype {info.dtype}")
        return float(struct.unpack("<" + code, data)[0])

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def __del__(self) -> None:
        self.close()

    def _read_into(self, view: memoryview, info: TensorInfo) -> None:
        self._fill(view, self.header.data_start + info.begin)

    def _fill(self, view: memoryview, offset: int) -> None:
        handle = self._open()
        while view:
            count = os.preadv(handle, [view], offset)
            if count == 0:
                self._changed()
            view = view[count:]
            offset += count

    def _open(self) -> int:
        with self._lock:
            if self._handle is None:
                try:
                    handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
                except OSError:
                    self._changed()
                if file_identity(os.fstat(handle)) != self.header.identity:
                    os.close(handle)
                    self._changed()
                self._handle = handle
            return self._handle

    def _changed(self) -> NoReturn:
        raise MergeFailure(
            "file_changed",
            f"{self.path.name} changed after it was checked",
            remedy="Do not write to a file while it is merged",
            where={"file": self.path.name},
        ) from None
