"""The benchmark of whole checkpoints measures what it says, and its inputs are the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from benchmarks import checkpoint_inputs, checkpoints
from benchmarks.checkpoint_inputs import SHAPES
from benchmarks.checkpoints import Row


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return checkpoint_inputs.checkpoint_set(tmp_path_factory.mktemp("set"), "tiny")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def test_the_checkpoints_load_in_transformers(paths: list[Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(paths[1], dtype=torch.bfloat16)
    assert sorted(model.state_dict()) == sorted(weights(paths[1]))
    assert len(AutoTokenizer.from_pretrained(paths[1])) == SHAPES["tiny"].vocab


def test_a_set_is_made_once_and_kept(paths: list[Path]) -> None:
    stamp = paths[0].stat().st_mtime_ns
    assert checkpoint_inputs.checkpoint_set(paths[0].parents[2], "tiny") == paths
    assert paths[0].stat().st_mtime_ns == stamp


def test_the_real_size_is_a_gigabyte_in_bf16() -> None:
    entries = 0
    for _, shape in SHAPES["real"].tensors():
        entries += int(torch.Size(shape).numel())
    assert 0.95e9 < 2 * entries < 1.1e9


def test_the_floor_is_the_sum_that_the_methods_make_too(paths: list[Path], tmp_path: Path) -> None:
    case = {"inputs": [str(path) for path in paths], "out": str(tmp_path / "floor")}
    checkpoints._floor(case)()
    ours = merging.merge(checkpoints.recipe("task_arithmetic", paths), tmp_path / "ours", threads=1)
    merged = weights(ours.path)
    for file in sorted((tmp_path / "floor").iterdir()):
        names = list(load_file(paths[0] / file.name))
        data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.bfloat16)
        wanted = torch.cat([merged[name].reshape(-1) for name in names])
        assert float((data.float() - wanted.float()).abs().max()) <= 2.0**-7


@pytest.mark.parametrize("method", checkpoints.METHODS)
def test_every_case_of_ours_runs(method: str, paths: list[Path], tmp_path: Path) -> None:
    for name, document in (
        ("recipe", checkpoints.recipe(method, paths)),
        ("configuration", checkpoints.configuration(method, paths)),
    ):
        result = merging.merge(document, tmp_path / name, threads=1)
        assert (result.report.get("compat") == "mergekit") == (name == "configuration")


def test_differing_numbers_are_counted(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        x = torch.ones(3, 4)
        x[1, 2] = value
        save_file({"x": x, "y": torch.zeros(2)}, tmp_path / name / "model.safetensors")
    assert checkpoints.compared(tmp_path / "a", tmp_path / "b") == (1, 14)


def test_the_table_states_ratios_to_the_floor_and_failures() -> None:
    run = {"cpu": 2.0, "wall": 3.0, "process": 5.0, "anonymous": 4e6}
    rows = [
        Row("floor", "sum", [run]),
        Row("ours", "ties", [{**run, "cpu": 5.0}, {**run, "cpu": 7.0}, {**run, "cpu": 6.0}]),
        Row("mergekit", "ties", error="no module"),
    ]
    assert checkpoints.table(rows).splitlines()[2:] == [
        "| sum | floor | 2.00 | 1.00 |  | 3.00 | 5.00 | 4 |",
        "| ties | ours | 6.00 | 3.00 | <= 4 | 3.00 | 5.00 | 4 |",
        "| ties | mergekit | failed: no module | | | | | |",
    ]
