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


def build_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The first bytes of the file and, for each spec, where its data starts after them.

    The header is padded so that the data is 8-byte aligned, and wider dtypes lie first so that every
    tensor is aligned to its own element size; else the order is that of ``specs``. Raises
    :class:`ValueError` for a repeated name.
    """
    offsets = [0] * len(specs)
    reached = 0
    for index in sorted(range(len(specs)), key=lambda index: -ITEM_BYTES[specs[index].dtype]):
        offsets[index] = reached
        reached += specs[index].nbytes
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for spec, offset in zip(specs, offsets, strict=True):
        if spec.name in header or spec.name == "__metadata__":
            raise ValueError(f"the tensor name {spec.name!r} occurs twice")
        ends = [offset, offset + spec.nbytes]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": ends}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


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
    head, offsets = build_header(specs, metadata)
    source = iter(tensors)
    with path.open("xb+") as file:
        try:
            file.write(head)
            for spec, offset in zip(specs, offsets, strict=True):
                data = _bytes_of(next(source, None), spec)
                file.seek(len(head) + offset)
                file.write(data)
                del data
            if next(source, None) is not None:
                raise ValueError("more tensors than specs")
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise


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
