"""mergekit 0.1.5 ran these configurations; the same numbers come out here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mergekit_tools import Checkpoints, cases, facts, reference, units_apart

from benchmarks.checkpoint_inputs import SHAPES, write_checkpoints
from benchmarks.mergekit_golden import digest


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(folder, SHAPES["tiny"])
    return Checkpoints(folder)


def test_the_inputs_are_those_that_mergekit_had(checkpoints: Checkpoints) -> None:
    found = {path.name: digest(path) for path in sorted(Path(checkpoints.folder).iterdir())}
    assert found == facts()["inputs"]


@pytest.mark.parametrize("case", sorted(cases()))
def test_every_tensor_is_mergekits_to_the_last_bit(case: str, checkpoints: Checkpoints) -> None:
    merged, wanted = dict(checkpoints.merge(cases()[case])), reference(case)
    assert sorted(merged) == sorted(wanted)
    for name, tensor in wanted.items():
        assert merged[name].dtype == tensor.dtype
        assert merged[name].shape == tensor.shape
        assert torch.equal(merged[name], tensor), (name, int(units_apart(merged[name], tensor).max()))


def test_slices_renumber_the_layers(checkpoints: Checkpoints) -> None:
    table = checkpoints.schedule(cases()["frankenmerge"])
    assert table.layers == facts()["cases"]["frankenmerge"]["num_hidden_layers"] == 4
