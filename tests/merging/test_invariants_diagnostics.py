"""What must not change the diagnostics, or change them in a known way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import (
    build_stack,
    found,
    mean_update,
    measured,
    module_of,
    told,
)
from torch import Tensor

from merging.diagnostics.telling import inputs_data
from merging.updates import UpdateStack

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
rank_lists = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
GAUGE_DEPENDENT = "average_error2"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], skip: tuple[str, ...] = ()) -> None:
    for name, value in expected.items():
        if name not in skip:
            # The smallest singular value of nearly dependent vectors is only known to the root of rounding.
            atol = 2e-6 if name.startswith("whitening") else 1e-7
            torch.testing.assert_close(
                actual[name],
                value,
                rtol=1e-6,
                atol=atol,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@given(rank_lists, shapes, st.integers(0, 99))
def test_the_split_into_factors_does_not_matter(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    B, A = [], []
    for one, other in zip(stack.B, stack.A, strict=True):
        r = one.shape[2]
        turn = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
        gauge = turn * torch.linspace(0.2, 3.0, r, dtype=torch.float64)
        B.append(one @ gauge)
        A.append(torch.linalg.inv(gauge) @ other)
    turned = UpdateStack(stack.names, stack.tasks, tuple(B), tuple(A))
    update = mean_update(stack)
    assert_same(found(measured(turned, update)), found(measured(stack, update)), skip=(GAUGE_DEPENDENT,))


@given(rank_lists, shapes, st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_the_models_only_orders_the_answer(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int, random: Any
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    order = random.sample(range(stack.T), stack.T)
    moved = UpdateStack(
        stack.names, stack.tasks, tuple(stack.B[t] for t in order), tuple(stack.A[t] for t in order)
    )
    update = mean_update(stack)
    expected = found(measured(stack, update))
    for name in ("gram", "row_overlap", "column_overlap", "pairs"):
        expected[name] = expected[name][order][:, order]
    for name in ("singular", "products", "alignment", "gap"):
        expected[name] = expected[name][order] if name != "singular" else expected[name]
    for name in ("row_cross", "row_inputs"):
        expected[name] = expected[name][:, order]
    assert_same(found(measured(moved, update)), expected)


@given(rank_lists, shapes, st.integers(0, 99), st.sampled_from([1e-3, 0.5, 40.0]))
def test_a_common_scale_changes_norms_and_no_shape(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int, scale: float
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    grown = UpdateStack(stack.names, stack.tasks, tuple(B * scale for B in stack.B), stack.A)
    before, after = told(stack), told(grown)
    lengths = {"sti", "l1_gap", "spectral_norm", "nuclear_norm"}

    def compare(name: str, one: Any, other: Any) -> None:
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            for key in one:
                compare(key, one[key], other[key])
        elif isinstance(one, list):
            for left, right in zip(one, other, strict=True):
                compare(name, left, right)
        elif one is None or other is None:
            assert one is other
        else:
            expected = one * scale if name in lengths else one
            assert other == pytest.approx(expected, rel=2e-5, abs=1e-6 * (scale if name in lengths else 1.0))

    compare("", before, after)


@given(rank_lists, shapes, st.integers(0, 99))
def test_the_transpose_swaps_rows_and_columns(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    swapped = UpdateStack(
        stack.names, stack.tasks, tuple(A.mT for A in stack.A), tuple(B.mT for B in stack.B)
    )
    one, other = found(measured(stack)), found(measured(swapped))
    expected = {name: one[name] for name in ("gram", "sti", "conflict", "pairs", "average_error2", "norm2")}
    for name, twin in (("row_overlap", "column_overlap"), ("whitening_rows", "whitening_columns")):
        expected |= {name: one[twin], twin: one[name]}
    assert_same(other, expected)


@given(rank_lists, shapes, st.integers(0, 99))
def test_shares_and_cosines_stay_in_their_ranges(
    ranks: tuple[int, ...], shape: tuple[int, int], seed: int
) -> None:
    stack = build_stack(ranks, *shape, seed=seed)
    facts = found(measured(stack))
    for name in ("row_overlap", "column_overlap", "conflict", "pairs", "alignment", "cancellation"):
        assert bool(((facts[name] >= -1e-12) & (facts[name] <= 1.0)).all()), name
    limit = min(shape)
    for entry, rank in zip(inputs_data(module_of(stack)), ranks, strict=True):
        ceiling = min(rank, limit) * (1 + 1e-6)
        assert 1.0 <= entry["stable_rank"] <= ceiling
        assert entry["stable_rank"] <= entry["participation_ratio"] * (1 + 1e-6) <= ceiling * (1 + 1e-5)
        assert 1.0 - 1e-6 <= entry["effective_rank"] <= ceiling
        assert entry["energy_rank_90"] <= entry["energy_rank_95"] <= entry["energy_rank_99"] <= ceiling
