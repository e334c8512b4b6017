"""Stacks and merges to measure, and what the diagnostics are by their definitions, in m x n matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from merging.diagnostics import Facts, measure
from merging.diagnostics.telling import Measured, inputs_data, module_data
from merging.lowrank import thin_svd
from merging.updates import LowRank, UpdateStack

ALL = 10**9
"""A sample that takes in every entry."""


def build_stack(
    ranks: tuple[int, ...], m: int, n: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> UpdateStack:
    generator = torch.Generator().manual_seed(seed)
    B = tuple(torch.randn(1, m, r, generator=generator, dtype=torch.float64).to(dtype) for r in ranks)
    A = tuple(torch.randn(1, r, n, generator=generator, dtype=torch.float64).to(dtype) for r in ranks)
    return UpdateStack(("layer",), tuple(range(len(ranks))), B, A)


def mean_update(stack: UpdateStack) -> LowRank:
    B, A = stack.joined()
    return LowRank(B / stack.T, A)


def measured(stack: UpdateStack, update: LowRank | None = None, **options: Any) -> Facts:
    (facts,) = measure(stack, update or mean_update(stack), **options)
    return facts


def module_of(stack: UpdateStack, update: LowRank | None = None, **options: Any) -> Measured:
    return Measured(stack.tasks, stack.m, stack.n, measured(stack, update, **options))


def told(stack: UpdateStack, update: LowRank | None = None, factor: float = 1.0) -> dict[str, Any]:
    """Everything the report says of one module."""
    module = module_of(stack, update)
    return {**module_data(module, factor), "inputs": inputs_data(module, factor)}


def reference(stack: UpdateStack, merged: Tensor) -> dict[str, Tensor]:
    """What :func:`measure` finds, for small modules, from the definitions."""
    deltas = stack.to(torch.float64).dense()[0]
    T = len(deltas)
    spectra = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    ranks = [int((S > 1e-5 * S[0]).sum()) for _, S, _ in spectra]
    U = [spectrum.U[:, :r] for spectrum, r in zip(spectra, ranks, strict=True)]
    V = [spectrum.Vh[:r].T for spectrum, r in zip(spectra, ranks, strict=True)]
    S = torch.cat([spectrum.S[:r] for spectrum, r in zip(spectra, ranks, strict=True)])
    left, right = torch.cat(U, 1), torch.cat(V, 1)
    eye = torch.eye(len(S), dtype=torch.float64)

    def pairs(function: Callable[[int, int], Tensor]) -> Tensor:
        return torch.stack([torch.stack([function(i, j) for j in range(T)]) for i in range(T)])

    def overlap(bases: list[Tensor]) -> Tensor:
        return pairs(lambda i, j: ((bases[i].T @ bases[j]) ** 2).sum() / min(ranks[i], ranks[j]))

    def smallest(vectors: Tensor) -> Tensor:
        size, count = vectors.shape
        return torch.linalg.svdvals(vectors)[-1] if count <= size else torch.tensor(0.0).double()

    W, values, _ = torch.linalg.svd(merged)
    kept = int(((values**2).flip(0).cumsum(0) > 0.05**2 * (values**2).sum()).sum())
    signs = deltas.sign()
    return {
        "gram": pairs(lambda i, j: (deltas[i] * deltas[j]).sum()),
        "row_overlap": overlap(V),
        "column_overlap": overlap(U),
        "sti": ((left.T @ left - eye) @ S.diag() @ (right.T @ right - eye)).abs().sum(),
        "whitening_columns": smallest(left),
        "whitening_rows": smallest(right),
        "mean2": (deltas.mean(0) ** 2).sum(),
        "conflict": ((deltas > 0).any(0) & (deltas < 0).any(0)).double().mean(),
        "pairs": pairs(lambda i, j: (signs[i] * signs[j] < 0).double().mean()),
        "cancellation": 1 - deltas.sum(0).abs().sum() / deltas.abs().sum(),
        "norm2": (merged**2).sum(),
        "products": torch.stack([(merged * delta).sum() for delta in deltas]),
        "singular": values,
        "alignment": torch.stack([(W[:, :kept].T @ delta).norm() / delta.norm() for delta in deltas]),
        "alignment_rank": torch.tensor(float(kept)).double(),
        "gap": torch.stack(
            [math.sqrt(2 / math.pi) * (merged - delta).norm(dim=1).mean() for delta in deltas]
        ),
    }


def found(facts: Facts) -> dict[str, Tensor]:
    assert facts.merged is not None
    values = {**vars(facts.inputs), **vars(facts.entries), **vars(facts.merged)}
    gap = facts.merged.gap(1.0)
    return {**values, "gap": gap, "cancellation": 1 - facts.entries.of_sum / facts.entries.of_parts}


def assert_agrees(facts: Facts, expected: dict[str, Tensor], tolerance: float) -> None:
    actual = found(facts)
    for name, value in expected.items():
        got = actual[name]
        if name == "singular":  # as many as the factors have columns; the others are zero
            width = min(len(got), len(value))
            assert not len(got) or float(value[width:].sum()) < 1e-9 * float(value[0])
            got, value = got[:width], value[:width]
        scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        torch.testing.assert_close(
            got, value, rtol=tolerance, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def inside(stack: UpdateStack) -> LowRank:
    """A merge in the span of the inputs, in factors that are not those of an SVD."""
    B, A = stack.joined()
    mix = torch.randn(A.shape[1], A.shape[1], generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return LowRank(B, mix.to(A) @ A)


def as_svd(stack: UpdateStack) -> LowRank:
    """The same as an SVD, as most methods emit it, with a padding column."""
    B, A = thin_svd(inside(stack)).balanced().factors()  # float64 whatever the inputs, as some kernels do
    return LowRank(torch.nn.functional.pad(B, (0, 1)), torch.nn.functional.pad(A, (0, 0, 0, 1)))


def rows_outside(stack: UpdateStack) -> LowRank:
    """Columns in the span, rows not (as entry-wise rules in KnOTS coordinates produce)."""
    B, A = stack.joined()
    return LowRank(B, torch.relu(A))


def outside(stack: UpdateStack) -> LowRank:
    """An update that has little to do with the inputs (as rules in full space produce)."""
    generator = torch.Generator().manual_seed(8)
    B = torch.randn(1, stack.m, 3, generator=generator, dtype=torch.float64)
    A = torch.randn(1, 3, stack.n, generator=generator, dtype=torch.float64)
    return LowRank(B.to(stack.like), A.to(stack.like))
