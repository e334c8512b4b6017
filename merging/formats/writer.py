"""Write results: a streaming safetensors writer and a directory that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merging.errors import MergeFailure
from merging.formats.guard import ITEM_BYTES
from merging.formats.result_dir import ResultDirectory
from merging.formats.tensors import TORCH_NAMES

if TYPE_CHECKING:
    import torch

__all__ = ["ResultDirectory", "TensorSpec", "build_header", "write_safetensors"]

_CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor to write: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def build_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of the file: the length and the JSON header, padded so that data is 8-byte aligned.

    Tensors lie in the order of ``specs``. Raises :class:`ValueError` for a repeated name, an unknown
    dtype, or a tensor that would not be aligned to its own element size (put wide dtypes first).
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.name in header or spec.name == "__metadata__":
            raise ValueError(f"the tensor name {spec.name!r} occurs twice")
        if offset % ITEM_BYTES[spec.dtype]:
            raise ValueError(f"tensor {spec.name} would be misaligned; write wider dtypes first")
        end = offset + spec.nbytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: str | Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> str:
    """Stream ``tensors`` (in the order of ``specs``) into a new file and return its sha256 (hex).

    Each tensor is cast to the dtype of its spec, checked, written and dropped before the next is asked
    for, so at most one is held. The file is synchronised to disk; after any error it does not exist.
    Raises :class:`MergeFailure` ``result_not_finite`` or ``result_overflow``, :class:`ValueError` when
    the tensors do not fit the specs, :class:`FileExistsError` when ``path`` exists.
    """
    path = Path(path)
    digest = hashlib.sha256()
    source = iter(tensors)
    with path.open("xb") as file:
        try:
            head = build_header(specs, metadata)
            digest.update(head)
            file.write(head)
            for spec in specs:
                data = _bytes_of(next(source, None), spec)
                for start in range(0, len(data), _CHUNK):
                    chunk = data[start : start + _CHUNK]
                    digest.update(chunk)
                    file.write(chunk)
                del data
            if next(source, None) is not None:
                raise ValueError("more tensors than specs")
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor | None, spec: TensorSpec) -> memoryview:
    """The little-endian bytes of a tensor after cast and check."""
    import torch

    if tensor is None:
        raise ValueError(f"no tensor for {spec.name}")
    if tuple(tensor.shape) != spec.shape:
        raise ValueError(f"{spec.name} has shape {tuple(tensor.shape)}, expected {spec.shape}")
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[spec.dtype])
    cast = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if cast.is_floating_point() and not _finite(cast):
        where = {"tensor": spec.name}
        if _finite(tensor.detach()):
            raise MergeFailure(
                "result_overflow",
                f"tensor {spec.name} has values beyond the range of {spec.dtype}",
                remedy="Ask for output dtype float32 or bfloat16",
                where=where,
            )
        raise MergeFailure("result_not_finite", f"tensor {spec.name} is not finite", where=where)
    return cast.reshape(-1).view(torch.uint8).numpy().data


def _finite(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
