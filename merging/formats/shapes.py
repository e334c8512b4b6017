"""The shapes that a pair of LoRA factors may have; the same rules for every file family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from merging.errors import InputError
from merging.formats.guard import TensorInfo

FACTOR_DTYPES = ("F64", "F32", "F16", "BF16")
DAMAGED = "The file is not as its trainer saved it; export it again"
WITHOUT_LAYER = "Train without such layers, or merge it into its base model first and merge the checkpoints"
Shape = tuple[int, ...]


class Shapes:
    """Checks factors of one file and refuses with the names of the file and the module."""

    def __init__(self, file: str, tensors: Mapping[str, TensorInfo]) -> None:
        self.file = file
        self.tensors = tensors

    def factor(self, name: str, key: str) -> TensorInfo:
        """A stored factor: at least two-dimensional, not empty, of a floating dtype.

        Raises :class:`InputError` ``empty_shard`` and ``factor_dtype``.
        """
        info = self.tensors[key]
        if len(info.shape) < 2 or 0 in info.shape:
            self.fail("empty_shard", name, f"has {key} of shape {info.shape}",
                      remedy="DeepSpeed ZeRO-3 or FSDP shards were saved without gathering them; "
                      "gather the full parameters before save_pretrained")  # fmt: skip
        if info.dtype not in FACTOR_DTYPES:
            self.fail("factor_dtype", name, f"has {key} of dtype {info.dtype}; "
                      "F64, F32, F16 and BF16 are accepted",
                      remedy="Save the adapter in one of these")  # fmt: skip
        return info

    def linear(self, name: str, A: Shape, B: Shape) -> tuple[int, int, int]:
        """``(m, n, rank)`` of A (rank, n) and B (m, rank). Raises ``factor_shape``."""
        if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
            self.misfit(name, A, B)
        return B[0], A[1], A[0]

    def conv(self, name: str, A: Shape, B: Shape) -> tuple[int, Shape]:
        """The rank and the base weight's shape of A (rank, in, kh, kw) and B (m, rank, 1, 1).

        Raises ``factor_shape``, ``conv_unsupported`` and ``grouped_conv_unsupported``.
        """
        if len(A) != len(B) or set(B[2:]) != {1}:
            self.misfit(name, A, B)
        if len(A) != 4:
            self.fail("conv_unsupported", name, f"is a {len(A) - 2}-dimensional convolution; "
                      "two-dimensional ones are supported",
                      remedy=WITHOUT_LAYER)  # fmt: skip
        rank, groups = A[0], A[0] // B[1]
        if rank != B[1]:
            if groups > 1 and groups * B[1] == rank:
                self.fail("grouped_conv_unsupported", name, f"is a convolution with {groups} groups, "
                          "whose update is not one low-rank matrix", remedy=WITHOUT_LAYER)  # fmt: skip
            self.misfit(name, A, B)
        return rank, (B[0], *A[1:])

    def misfit(self, name: str, A: Shape, B: Shape) -> NoReturn:
        """The factors cannot be multiplied."""
        self.fail("factor_shape", name, f"has A {A} and B {B}, which do not multiply", remedy=DAMAGED)

    def fail(self, code: str, name: str, what: str, *, remedy: str | None = None) -> NoReturn:
        """Refuse the file because of a module."""
        fail(code, self.file, name, what, remedy=remedy, subject=f"{self.file}: module {name}")


def common_dtype(a: str, b: str) -> str:
    """The dtype in which both factors are exact."""
    if a == b:
        return a
    return "F64" if "F64" in (a, b) else "F32"


def fail(
    code: str,
    file: str,
    module: str | None,
    what: str,
    *,
    remedy: str | None = None,
    subject: str | None = None,
) -> NoReturn:
    """Raise an :class:`InputError` about a file and, if there is one, a module in it."""
    where = {"file": file} | ({"module": module} if module else {})
    raise InputError(code, f"{subject or file} {what}", remedy=remedy, where=where)


def stored_twice(file: str, module: str, keys: tuple[str, str] | None = None) -> NoReturn:
    """Refuse a file that says two things about one module."""
    which = f": {keys[0]} and {keys[1]}" if keys else ""
    fail("duplicate_module", file, module, f"is stored under two names{which}",
         remedy="Remove one of them", subject=f"{file}: {module}")  # fmt: skip
