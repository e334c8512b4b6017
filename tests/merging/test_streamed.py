"""The order statistic in blocks is that of a full sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from merging.streamed import SMALL, kth_magnitude


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "small": normal(3, 5, 7),
    "large": normal(4, 32, 5000),
    "few columns": normal(50_000, 3),
    "heavy tail": normal(8, 64, 400) ** 5,
    "one large column": normal(300, 700) * torch.linspace(0.0, 1.0, 700) ** 20,
    "ties": normal(200, 900).round(),
    "all equal": torch.full((300, 500), -2.0),
    "mostly zero": normal(300, 500) * (normal(300, 500) > 2.5),
    "float64": normal(30, 9000).double(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.999, 1.0])
def test_the_kth_magnitude_is_exact(case: str, share: float) -> None:
    values = CASES[case]
    k = min(max(1, int(share * values.numel())), values.numel())
    expected = values.abs().flatten().sort(descending=True).values[k - 1]
    assert torch.equal(kth_magnitude(values, k), expected)
    assert kth_magnitude(values, k).dtype == values.dtype


def test_the_values_are_not_touched_and_k_is_checked() -> None:
    values = normal(2, SMALL)
    before = values.clone()
    kth_magnitude(values, 100)
    assert torch.equal(values, before)
    for k in (0, values.numel() + 1):
        with pytest.raises(ValueError, match="k must be in"):
            kth_magnitude(values, k)
