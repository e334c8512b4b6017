"""Task updates in factored form.

Notation, used everywhere: ``m`` out features, ``n`` in features, ``B (m, r)``, ``A (r, n)``, and a task's
update ``delta = scale * B @ A`` with the scale already folded into the factors; ``T`` tasks; ``R`` the sum
of their ranks. Modules of equal shape and ranks are batched in a leading dimension ``G``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The update ``B @ A`` of ``G`` modules.

    ``B`` is ``(G, m, k)`` and ``A`` is ``(G, k, n)``. ``B=None`` stands for the identity of size ``m`` (then
    ``A`` is the dense update), ``A=None`` for the identity of size ``n``; at most one of them is ``None``.
    """

    B: Tensor | None
    A: Tensor | None

    @property
    def any(self) -> Tensor:
        """The factor that exists; for dtype, device and batch size."""
        factor = self.B if self.B is not None else self.A
        assert factor is not None
        return factor

    @property
    def rank(self) -> int:
        """``k``, the inner dimension."""
        return self.B.shape[-1] if self.B is not None else self.any.shape[-2]

    def dense(self) -> Tensor:
        """``(G, m, n)``."""
        if self.B is None or self.A is None:
            return self.any
        return self.B @ self.A

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors, with an identity written out where one is implied."""
        some = self.any
        B = self.B if self.B is not None else _eye(some, some.shape[-2])
        A = self.A if self.A is not None else _eye(some, some.shape[-1])
        return B, A

    def scaled(self, factor: Tensor | float) -> LowRank:
        """The update times ``factor`` (a number, or one per module as ``(G, 1, 1)``)."""
        if self.B is None:
            return LowRank(None, self.any * factor)
        return LowRank(self.B * factor, self.A)


class Coordinates(Protocol):
    """``T`` task updates of ``G`` modules, seen as matrices of ``m`` rows and ``n`` columns.

    What an entry-wise rule needs: it does not care whether the entries are those of the full matrices or
    coordinates in a small frame.
    """

    @property
    def G(self) -> int: ...
    @property
    def T(self) -> int: ...
    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def like(self) -> Tensor:
        """Some tensor of the right dtype and device."""
        ...

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """The rows ``start:stop`` of every task, ``(G, T, stop - start, n)``; written to ``out`` if given."""
        ...

    def grid(self, row_step: int, col_step: int) -> Tensor:
        """Every ``row_step``-th row and ``col_step``-th column of every task, ``(G, T, ., .)``."""
        ...

    def task(self, t: int) -> Tensor:
        """The whole matrix of task ``t``, ``(G, m, n)``."""
        ...


@dataclass(frozen=True)
class UpdateStack:
    """The ``T`` low-rank task updates of ``G`` same-shape modules.

    ``B[t]`` is ``(G, m, r_t)``, ``A[t]`` is ``(G, r_t, n)``. ``names`` are the modules, ``tasks`` the
    indices of the tasks in the merge (a task without the module is absent). Ranks may differ by task.
    """

    names: tuple[str, ...]
    tasks: tuple[int, ...]
    B: tuple[Tensor, ...]
    A: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not self.B or len(self.B) != len(self.A) or len(self.B) != len(self.tasks):
            raise ValueError("a stack needs one B and one A per task, and at least one task")
        for B, A in zip(self.B, self.A, strict=True):
            if B.ndim != 3 or A.ndim != 3 or B.shape[2] != A.shape[1]:
                raise ValueError(f"factors {tuple(B.shape)} and {tuple(A.shape)} do not chain")
            if B.shape[:2] != (self.G, self.m) or A.shape[::2] != (self.G, self.n):
                raise ValueError("the factors of a stack must agree in G, m and n")

    @property
    def G(self) -> int:
        return self.B[0].shape[0]

    @property
    def T(self) -> int:
        return len(self.B)

    @property
    def m(self) -> int:
        return self.B[0].shape[1]

    @property
    def n(self) -> int:
        return self.A[0].shape[2]

    @property
    def ranks(self) -> tuple[int, ...]:
        """``r_t`` per task."""
        return tuple(B.shape[2] for B in self.B)

    @property
    def R(self) -> int:
        """The sum of the ranks."""
        return sum(self.ranks)

    @property
    def like(self) -> Tensor:
        return self.B[0]

    @staticmethod
    def of_joined(
        names: tuple[str, ...], tasks: tuple[int, ...], ranks: Sequence[int], B: Tensor, A: Tensor
    ) -> UpdateStack:
        """A stack whose factors are views of ``B (G, m, R)`` and ``A (G, R, n)``; it keeps these."""
        sizes = list(ranks)
        stack = UpdateStack(names, tasks, torch.split(B, sizes, dim=2), torch.split(A, sizes, dim=1))
        stack.__dict__["_joined"] = B, A
        return stack

    def joined(self) -> tuple[Tensor, Tensor]:
        """All factors side by side: ``(G, m, R)`` and ``(G, R, n)``; not to be written to."""
        known: tuple[Tensor, Tensor] | None = self.__dict__.get("_joined")
        return known or (torch.cat(self.B, dim=2), torch.cat(self.A, dim=1))

    def split(self, joined: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Cut a dimension of size ``R`` into the blocks of the tasks."""
        return torch.split(joined, list(self.ranks), dim=dim)

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = self.like.new_empty((self.G, self.T, stop - start, self.n))
        for t, (B, A) in enumerate(zip(self.B, self.A, strict=True)):
            torch.matmul(B[:, start:stop], A, out=out[:, t])
        return out

    def grid(self, row_step: int, col_step: int) -> Tensor:
        pairs = zip(self.B, self.A, strict=True)
        return torch.stack([B[:, ::row_step] @ A[:, :, ::col_step] for B, A in pairs], dim=1)

    def task(self, t: int) -> Tensor:
        return self.B[t] @ self.A[t]

    def dense(self) -> Tensor:
        """Every task as a matrix, ``(G, T, m, n)``; only for small coordinates."""
        return self.rows(0, self.m)

    def scaled(self, weights: Tensor) -> UpdateStack:
        """Task ``t`` times ``weights[t]``; ``weights`` is ``(T,)``."""
        B = tuple(B * weights[t].to(B) for t, B in enumerate(self.B))
        return UpdateStack(self.names, self.tasks, B, self.A)

    def to(self, dtype: torch.dtype) -> UpdateStack:
        """The same stack in another floating-point type."""
        return UpdateStack(
            self.names,
            self.tasks,
            tuple(B.to(dtype) for B in self.B),
            tuple(A.to(dtype) for A in self.A),
        )


def _eye(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(like.shape[0], size, size)
