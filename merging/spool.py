"""Results on their way to the output file: kept on disk, so that memory does not grow with the model."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the spool."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Spool:
    """An unnamed temporary file in ``folder`` that holds tensors; gone when it is closed."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by __exit__)
        self._slots: dict[str, Slot] = {}
        self._end = 0

    def put(self, key: str, tensor: Tensor) -> None:
        """Append a CPU tensor."""
        data = tensor.detach().contiguous()
        self._slots[key] = Slot(self._end, tuple(data.shape), data.dtype)
        self._file.seek(self._end)
        self._end += self._file.write(data.view(-1).view(torch.uint8).numpy().data)

    def put_factors(self, name: str, B: Tensor | None, A: Tensor | None) -> None:
        """Append the factors of a module; one that is an identity is left out."""
        for key, factor in (("B", B), ("A", A)):
            if factor is not None:
                self.put(f"{name}.{key}", factor)

    def get(self, key: str) -> Tensor:
        """Read a tensor back."""
        slot = self._slots[key]
        raw = torch.empty(torch.Size(slot.shape).numel() * slot.dtype.itemsize, dtype=torch.uint8)
        self._file.seek(slot.offset)
        read = self._file.readinto(raw.numpy().data)
        if read != raw.numel():
            raise OSError(f"the spool is {raw.numel() - read} bytes short")
        return raw.view(slot.dtype).reshape(slot.shape)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._slots[key].shape

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
