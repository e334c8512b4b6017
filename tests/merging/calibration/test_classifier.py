"""How a head reads the output of a base model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from merging.calibration.classifier import TaskHead, pooled
from merging.calibration.settings import HeadSettings

HIDDEN = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)
RIGHT, LEFT = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "mask", "places"),
    [
        ("first", None, ([0], [0])),
        ("last", None, ([3], [3])),
        ("mean", None, ([0, 1, 2, 3], [0, 1, 2, 3])),
        ("first", RIGHT, ([0], [0])),
        ("last", RIGHT, ([2], [1])),
        ("mean", RIGHT, ([0, 1, 2], [0, 1])),
        ("first", LEFT, ([1], [2])),
        ("last", LEFT, ([3], [3])),
        ("mean", LEFT, ([1, 2, 3], [2, 3])),
    ],
)
def test_padding_on_either_side_is_not_pooled(
    pooling: str, mask: torch.Tensor | None, places: tuple[list[int], list[int]]
) -> None:
    settings = HeadSettings.model_validate({"pooling": pooling})
    found = pooled(SimpleNamespace(last_hidden_state=HIDDEN), mask, settings)
    for row, chosen in enumerate(places):
        torch.testing.assert_close(found[row], HIDDEN[row, chosen].mean(0))


def test_the_scale_is_that_of_the_features_and_not_of_the_bias() -> None:
    weight, bias = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([0.5, -1.0])
    base = SimpleNamespace(
        device=torch.device("cpu"), run=lambda _batch, _replaced: SimpleNamespace(last_hidden_state=HIDDEN)
    )
    head = SimpleNamespace(file=object(), linear=lambda: (weight, bias))
    settings = HeadSettings(pooling="first", scale=10.0)
    logits = TaskHead(head, settings, base, "task").logits({})  # type: ignore[arg-type]
    torch.testing.assert_close(logits, 10.0 * HIDDEN[:, 0] @ weight.T + bias)
