"""Random and degenerate stacks for property tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from merging.updates import UpdateStack


@st.composite
def stacks(
    draw: st.DrawFn,
    *,
    min_tasks: int = 1,
    kinds: Sequence[str] = ("random", "duplicates", "zero", "deficient", "shared"),
) -> UpdateStack:
    """A batch of one or two modules with 1 to 4 tasks of mixed ranks; often ``R > min(m, n)``.

    ``duplicates``: two tasks are the same; ``zero``: one has no update; ``deficient``: one repeats its own
    directions; ``shared``: all have the same ``A``.
    """
    G = draw(st.integers(1, 2))
    T = draw(st.integers(min_tasks, 4))
    m, n = draw(st.integers(3, 12)), draw(st.integers(3, 12))
    kind = draw(st.sampled_from(list(kinds)))
    one_rank = kind in ("duplicates", "shared")
    ranks = (
        [draw(st.integers(1, 4))] * T
        if one_rank
        else draw(st.lists(st.integers(1, 4), min_size=T, max_size=T))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B = [normal(G, m, r) for r in ranks]
    A = [normal(G, r, n) for r in ranks]
    if kind == "duplicates":
        B[-1], A[-1] = B[0].clone(), A[0].clone()
    elif kind == "zero":
        B[0] = torch.zeros_like(B[0])
    elif kind == "deficient":
        B[0] = B[0][:, :, :1].expand_as(B[0]).clone()
    elif kind == "shared":
        A = [A[0].clone() for _ in A]
    return UpdateStack(tuple(f"m{g}" for g in range(G)), tuple(range(T)), tuple(B), tuple(A))


def module(stack: UpdateStack, g: int) -> UpdateStack:
    """Module ``g`` of a batch, alone."""
    B = tuple(B[g : g + 1] for B in stack.B)
    return UpdateStack((stack.names[g],), stack.tasks, B, tuple(A[g : g + 1] for A in stack.A))


def permuted(stack: UpdateStack, order: Sequence[int]) -> UpdateStack:
    """The same tasks in another order."""
    return UpdateStack(
        stack.names, stack.tasks, tuple(stack.B[t] for t in order), tuple(stack.A[t] for t in order)
    )


def transposed(stack: UpdateStack) -> UpdateStack:
    """Every delta transposed."""
    return UpdateStack(stack.names, stack.tasks, tuple(A.mT for A in stack.A), tuple(B.mT for B in stack.B))


def copies(stack: UpdateStack, count: int) -> UpdateStack:
    """The first task ``count`` times."""
    return UpdateStack(stack.names, tuple(range(count)), (stack.B[0],) * count, (stack.A[0],) * count)
