"""Entry-wise rules, position by position, against loops over plain numbers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merging import rules
from merging.catalog import get
from merging.kernels import Context
from merging.masks import MaskStream
from merging.updates import UpdateStack

columns = st.lists(
    st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]) | st.floats(-4.0, 4.0, width=32),
    min_size=1,
    max_size=5,
)
"""The entries of all tasks at one position."""


def tasks(column: list[float]) -> Tensor:
    return torch.tensor(column, dtype=torch.float64).view(-1, 1, 1)


def sign_of(number: float) -> int:
    return (number > 0) - (number < 0)


@given(columns, st.sampled_from(["total", "frequency"]), st.sampled_from([1.0, -1.0, 0.0]))
def test_the_elected_sign_is_that_of_the_sum_or_of_the_count(
    column: list[float], method: rules.SignMethod, zero: float
) -> None:
    votes = column if method == "total" else [sign_of(entry) for entry in column]
    total = float(tasks([float(vote) for vote in votes]).sum(0))
    expected = sign_of(total) or zero
    x = tasks(column)
    assert float(rules.elect(x, method, zero)) == expected
    assert torch.equal(x, tasks(column))


@given(columns, st.sampled_from([1.0, -1.0, 0.0]))
def test_the_disjoint_merge_uses_the_entries_of_the_elected_sign(column: list[float], sign: float) -> None:
    direction = 1.0 if sign > 0 else -1.0  # a sign of zero counts as negative
    agreeing = [abs(entry) for entry in column if entry * direction > 0]
    elected = torch.full((1, 1, 1), sign, dtype=torch.float64)
    total = direction * sum(agreeing)
    expected = {
        "sum": total,
        "mean": total / max(1, len(agreeing)),
        "max": sign * max(agreeing, default=0.0),
    }
    for agg, value in expected.items():
        x = tasks(column)
        assert float(rules.disjoint(x, elected, agg)) == pytest.approx(value)  # type: ignore[arg-type]
        assert torch.equal(x, tasks(column))
        assert float(rules.disjoint_(x, elected, agg)) == pytest.approx(value)  # type: ignore[arg-type]


@given(columns, st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=5, max_size=5))
def test_the_divisor_can_be_the_sum_of_the_weights_of_those_that_agree(
    column: list[float], weights: list[float]
) -> None:
    kept = [(entry, w) for entry, w in zip(column, weights, strict=False) if entry > 0]
    divisor = sum(w for _, w in kept)
    expected = sum(entry for entry, _ in kept) / (divisor if abs(divisor) >= 1e-8 else 1.0)
    elected = torch.ones((1, 1, 1), dtype=torch.float64)
    merged = rules.disjoint(tasks(column), elected, "mean", tasks(weights[: len(column)]))
    assert float(merged) == pytest.approx(expected)


def test_trimming_keeps_what_equals_the_threshold() -> None:
    x = torch.tensor([[[1.0, -2.0, 0.5, 2.0]]])
    assert rules.trim(x, torch.tensor([[[2.0]]])).tolist() == [[[0.0, -2.0, 0.0, 2.0]]]
    assert x.tolist() == [[[1.0, -2.0, 0.5, 2.0]]]


def test_a_band_keeps_both_its_ends() -> None:
    x = torch.tensor([[[1.0, -2.0, 0.5, 3.0]]])
    low, high = torch.tensor([[[1.0]]]), torch.tensor([[[2.0]]])
    assert rules.band_(x, low, high).tolist() == [[[1.0, -2.0, 0.0, 0.0]]]


@pytest.mark.parametrize(
    ("counting", "density", "expected"),
    [
        ("floor", 0.25, 25),
        ("floor", 0.259, 25),
        ("floor", 0.001, 1),
        ("floor", 1.0, 100),
        ("inclusive", 0.25, 26),
        ("inclusive", 0.999, 100),
        ("complement", 0.25, 25),
        ("complement", 0.259, 26),
        ("complement", 0.8, 80),  # 1 - 0.8 is a little less than 0.2 in binary
    ],
)
def test_how_many_entries_a_density_keeps(counting: rules.Counting, density: float, expected: int) -> None:
    assert rules.kept_count(100, density, counting) == expected


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.0, 1e-30]), min_size=1, max_size=9), st.booleans())
def test_rows_are_ranked_by_magnitude_and_equal_ones_by_column(row: list[float], single: bool) -> None:
    x = torch.tensor([row, row[::-1]], dtype=torch.float32 if single else torch.float64)
    for values, ranks in zip(x.tolist(), rules.row_ranks(x).tolist(), strict=True):
        order = sorted(range(len(values)), key=lambda column: (abs(values[column]), column))
        assert [order.index(column) + 1 for column in range(len(values))] == ranks


def stream(
    cols: int, *, names: tuple[str, ...] = ("a",), digests: tuple[str, ...] = ("x", "y"), seed: int = 0
) -> MaskStream:
    params = get("dare_linear").Params()
    G, T = len(names), len(digests)
    stack = UpdateStack(names, tuple(range(T)), (torch.zeros(G, 1, 1),) * T, (torch.zeros(G, 1, cols),) * T)
    return MaskStream(stack, Context(params, (params,) * T, digests, seed=seed), [cols] * G)


@given(st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_masks_do_not_depend_on_the_size_of_the_blocks(cols: int, blocks: list[int]) -> None:
    rows = sum(blocks)
    whole = stream(cols).keep(torch.empty(1, 2, rows, cols), [0.3, 0.6])
    parts = stream(cols)
    pieces = [parts.keep(torch.empty(1, 2, size, cols), [0.3, 0.6]) for size in blocks]
    assert torch.equal(torch.cat(pieces, dim=-2), whole)


def test_masks_belong_to_seed_input_and_module() -> None:
    shape = torch.empty(2, 2, 8, 33)
    base = stream(33, names=("a", "b")).keep(shape, [0.5, 0.5])
    swapped = stream(33, names=("b", "a"), digests=("y", "x")).keep(shape, [0.5, 0.5])
    assert torch.equal(base, swapped.flip(0, 1))
    parts = [base[0, 0], base[0, 1], base[1, 0], stream(33, seed=1).keep(shape[:1], [0.5, 0.5])[0, 0]]
    assert len({part.numpy().tobytes() for part in parts}) == 4


@pytest.mark.parametrize("cols", [1, 2, 300, 1023, 1024, 1500])
@pytest.mark.parametrize("kind", ["bf16 differences", "float32", "a few odd rows", "zeros", "all sizes"])
def test_ranks_are_those_of_a_stable_sort(kind: str, cols: int) -> None:
    generator = torch.Generator().manual_seed(cols)
    noise = torch.randn(2, 3, 12, cols, generator=generator)
    base = torch.randn(noise.shape, generator=generator).bfloat16()
    x = (base.float() + 0.02 * noise).bfloat16().float() - base.float()
    if kind == "float32":
        x = noise
    elif kind == "a few odd rows":
        x[..., 3, :] += 1e-5 * noise[..., 3, :]
        x[..., 5, 0] = 1e-20
    elif kind == "zeros":
        x.zero_()
    elif kind == "all sizes":
        x = noise * torch.exp2(-130.0 * torch.rand(noise.shape, generator=generator))
    order = x.abs().sort(dim=-1, stable=True).indices
    wanted = torch.empty_like(x).scatter_(-1, order, torch.arange(1.0, cols + 1).expand(x.shape))
    assert torch.equal(rules.row_ranks(x), wanted)


def test_masks_keep_the_share_that_is_asked_for() -> None:
    x = torch.empty(1, 2, 400, 501, dtype=torch.float64)
    shares = stream(501).keep(x, [0.1, 0.9]).mean((-2, -1))[0]
    assert shares.tolist() == pytest.approx([0.1, 0.9], abs=4 * (0.09 / 200_400) ** 0.5)
    per_entry = torch.full_like(x, 0.25)
    assert torch.equal(stream(501).keep(x, per_entry), stream(501).keep(x, [0.25, 0.25]))
    assert bool((stream(501).keep(x, [1.0, 1.0]) == 1.0).all())


def test_masks_are_the_same_numbers_for_ever() -> None:
    mask = stream(16).keep(torch.empty(1, 2, 16, 16), [0.5, 0.5])
    packed = mask.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(packed).hexdigest()[:16] == "a7c6a8bf291b9861"
