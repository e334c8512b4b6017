"""Exact order statistics: the same entries as a stable sort keeps, whatever the ties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merging.mergekit.cuts import Cut, keep_band, keep_largest


@dataclass
class Bits:
    """Magnitudes in an array; ``lie`` gives a sample that has nothing to do with them."""

    values: np.ndarray
    length: int = 7
    lie: bool = False

    @property
    def entries(self) -> int:
        return self.values.size

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, self.entries, self.length):
            yield start, self.block(start)

    def block(self, start: int) -> np.ndarray:
        return self.values[start : start + self.length]

    def sample(self, size: int) -> np.ndarray:
        found = self.values[None, :: max(1, self.entries // 50)]
        return np.full_like(found, 3) if self.lie else found.copy()


def kept(values: np.ndarray, cut: Cut) -> np.ndarray:
    return (values > cut.value) | ((values == cut.value) & (np.arange(values.size) < cut.position))


def within(values: np.ndarray, low: Cut, high: Cut) -> np.ndarray:
    index = np.arange(values.size)
    above = (values > low.value) | ((values == low.value) & (index >= low.position))
    return above & ((values < high.value) | ((values == high.value) & (index < high.position)))


def first(order: np.ndarray, start: int, stop: int) -> np.ndarray:
    mask = np.zeros(order.size, np.bool_)
    mask[order[start:stop]] = True
    return mask


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@given(data=st.data(), lie=st.booleans(), spread=st.sampled_from([1, 3, 40, 30_000]))
@settings(max_examples=60, deadline=None)
def test_exactly_the_entries_of_a_stable_sort_stay(
    dtype: type, data: st.DataObject, lie: bool, spread: int
) -> None:
    size = data.draw(st.integers(1, 300))
    scale = {np.int16: 1, np.int32: 70_000, np.int64: 300_000_000_000}[dtype]
    drawn = data.draw(st.lists(st.integers(0, spread), min_size=size, max_size=size))
    values = (np.array(drawn, np.int64) * scale).astype(dtype)
    count = data.draw(st.integers(1, size))
    bits = Bits(values, lie=lie)
    (cut,) = keep_largest([bits], [count])
    assert np.array_equal(
        kept(values, cut), first(np.argsort(-values.astype(np.int64), kind="stable"), 0, count)
    )
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    ((low, high),) = keep_band([bits], [(start, stop)])
    assert np.array_equal(within(values, low, high), first(np.argsort(values, kind="stable"), start, stop))


def test_a_large_array_of_16_bit_magnitudes_with_many_ties() -> None:
    values = (
        np.random.default_rng(0).standard_normal(300_000).astype(np.float32).view(np.int32) >> 16
    ) & 0x7FFF
    bits = Bits(values.astype(np.int16), length=1 << 14)
    (cut,) = keep_largest([bits], [60_000])
    assert int(kept(bits.values, cut).sum()) == 60_000
    assert int((bits.values == cut.value).sum()) > 100
