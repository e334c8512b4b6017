"""The basis file: adapters come back out of it in PEFT's format, and tasks can be added."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merging
from merging import basis
from merging.basis_file import BASIS_NAME, METADATA_KEY, BasisFile
from merging.errors import InputError
from merging.formats.adapter import open_adapter
from merging.methods import rmm

TASKS = ("biblegenre", "icd", "langid")


def fitted(
    examples_dir: Path, out: Path, parameters: dict[str, Any] | None = None, dtype: str = "float32"
) -> Path:
    """An ``rmm`` merge of three real adapters."""
    recipe = {
        "merge_method": "rmm",
        "models": [{"model": str(examples_dir / "adapters" / task)} for task in TASKS],
        "parameters": parameters or {},
        "output": {"dtype": dtype},
    }
    return merging.merge(recipe, out, device="cpu", threads=1).path


@pytest.fixture(scope="module")
def result(examples_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(examples_dir, tmp_path_factory.mktemp("rmm") / "out")


def refusal(action: Any, code: str) -> InputError:
    with pytest.raises(InputError) as caught:
        action()
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize("parameters", [{}, {"basis_size": 0}, {"granularity": "factor"}, {"lambda": 0.5}])
def test_what_is_recovered_is_what_the_merge_wrote(
    examples_dir: Path, tmp_path: Path, parameters: dict[str, Any]
) -> None:
    out = fitted(examples_dir, tmp_path / "out", parameters)
    for task in TASKS:
        files = basis.recover(out, task, tmp_path / task)
        assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
        written = load_file(out / task / "adapter_model.safetensors")
        found = load_file(tmp_path / task / "adapter_model.safetensors")
        assert written.keys() == found.keys()
        assert all(torch.equal(written[key], found[key]) for key in written)
        configs = [
            json.loads((folder / "adapter_config.json").read_text())
            for folder in (out / task, tmp_path / task)
        ]
        assert configs[0] == configs[1]


def test_a_full_basis_gives_the_inputs_back(examples_dir: Path, tmp_path: Path) -> None:
    out = fitted(examples_dir, tmp_path / "out", {"basis_size": 2})
    basis.recover(out / BASIS_NAME, "icd", tmp_path / "icd")
    with open_adapter(examples_dir / "adapters" / "icd") as given, open_adapter(tmp_path / "icd") as back:
        assert list(given.modules) == list(back.modules)
        assert back.base_model == given.base_model
        for name in given.modules:
            B, A = given.factors(name)
            near_B, near_A = back.factors(name)
            assert (B @ A - near_B @ near_A).norm() < 1e-5 * (B @ A).norm()


def test_the_report_states_what_was_saved_and_lost(result: Path) -> None:
    report = json.loads((result / "report.json").read_text())
    with BasisFile(result) as file:
        for name, facts in report["modules"].items():
            kept = rmm.storage_ratio(file.basis(name), (16, 16, 16))
            assert facts["storage_ratio"] == pytest.approx(kept)
            assert all(0.0 < error < 1.0 for error in facts["recon_error"])


def test_a_basis_in_half_precision_recovers_to_that_precision(examples_dir: Path, tmp_path: Path) -> None:
    out = fitted(examples_dir, tmp_path / "out", dtype="float16")
    basis.recover(out, "icd", tmp_path / "icd")
    basis.recover(out, "icd", tmp_path / "wide", dtype="F32")
    half = load_file(tmp_path / "icd" / "adapter_model.safetensors")
    wide = load_file(tmp_path / "wide" / "adapter_model.safetensors")
    written = load_file(out / "icd" / "adapter_model.safetensors")
    for key, tensor in half.items():
        assert tensor.dtype == torch.float16
        assert wide[key].dtype == torch.float32
        assert (tensor.float() - written[key].float()).norm() < 1e-2 * written[key].float().norm()


def test_a_task_can_be_added_and_recovered(examples_dir: Path, result: Path, tmp_path: Path) -> None:
    given = examples_dir / "adapters" / "supersense"
    done = basis.add_task(result, given, tmp_path / "more", label="fourth")
    assert done["task"] == "fourth"
    with BasisFile(tmp_path / "more") as file, BasisFile(result) as before:
        assert file.info.tasks == (*before.info.tasks, "fourth")
        assert sorted(done["recon_error"]) == sorted(file.info.modules)
        assert file.metadata == before.metadata
    for task in TASKS:  # the others stay as they were
        basis.recover(tmp_path / "more", task, tmp_path / task)
        one = load_file(tmp_path / task / "adapter_model.safetensors")
        other = load_file(result / task / "adapter_model.safetensors")
        assert all(torch.equal(one[key], other[key]) for key in one)
    basis.recover(tmp_path / "more", "fourth", tmp_path / "fourth")
    with open_adapter(given) as wanted, open_adapter(tmp_path / "fourth") as found:
        for name, error in done["recon_error"].items():
            B, A = wanted.factors(name)
            near_B, near_A = found.factors(name)
            assert error == pytest.approx(float((B @ A - near_B @ near_A).norm() / (B @ A).norm()), rel=1e-3)


def test_adding_the_same_adapter_again_gives_it_again(examples_dir: Path, tmp_path: Path) -> None:
    out = fitted(examples_dir, tmp_path / "out", {"basis_size": 2, "align": "none"})
    done = basis.add_task(out, examples_dir / "adapters" / "icd", tmp_path / "more", label="again")
    assert max(done["recon_error"].values()) < 1e-5


def test_a_task_that_does_not_fit_is_refused(examples_dir: Path, result: Path, tmp_path: Path) -> None:
    given = examples_dir / "adapters" / "supersense"
    error = refusal(lambda: basis.add_task(result, given, tmp_path / "a", label="icd"), "task_exists")
    assert error.where["model"] == "icd"
    weights = load_file(given / "adapter_model.safetensors")
    names = sorted(weights)

    def changed(folder: str, tensors: dict[str, torch.Tensor]) -> Path:
        path = tmp_path / folder
        path.mkdir()
        (path / "adapter_config.json").write_bytes((given / "adapter_config.json").read_bytes())
        save_file(tensors, path / "adapter_model.safetensors")
        return path

    fewer = changed("fewer", {name: weights[name].contiguous() for name in names[2:]})
    refusal(lambda: basis.add_task(result, fewer, tmp_path / "b"), "missing_modules")
    first = names[0].replace("layer.0", "layer.99"), names[1].replace("layer.0", "layer.99")
    more = changed(
        "more", {**weights, first[0]: weights[names[0]].clone(), first[1]: weights[names[1]].clone()}
    )
    refusal(lambda: basis.add_task(result, more, tmp_path / "c"), "unexpected_modules")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("task", ["nobody", 3, -1])
def test_an_unknown_task_is_refused_with_the_names(result: Path, tmp_path: Path, task: str | int) -> None:
    error = refusal(lambda: basis.recover(result, task, tmp_path / "out"), "unknown_task")
    assert "icd" in str(error)
    assert not (tmp_path / "out").exists()


def test_tasks_may_be_numbers(result: Path, tmp_path: Path) -> None:
    with BasisFile(result) as file:
        name = file.info.tasks[1]
    files = basis.recover(result, 1, tmp_path / "a")
    assert files == basis.recover(result, name, tmp_path / "b")
    refusal(lambda: basis.recover(result, 1, tmp_path / "a"), "output_exists")
    assert basis.recover(result, 1, tmp_path / "a", overwrite=True) == files


def rewritten(result: Path, out: Path, change: Any) -> Path:
    """The basis with its tensors or its description changed by hand."""
    tensors = load_file(result / BASIS_NAME)
    with BasisFile(result) as file:
        info = json.loads(file.info.model_dump_json())
    metadata = {METADATA_KEY: info}
    change(tensors, metadata)
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file(tensors, out / BASIS_NAME, metadata=text)
    return out


def test_a_damaged_basis_is_refused(result: Path, tmp_path: Path) -> None:
    some = min(load_file(result / BASIS_NAME))

    def info(metadata: dict[str, Any]) -> dict[str, Any]:
        return metadata[METADATA_KEY]

    changes: dict[str, Any] = {
        "no description": lambda tensors, metadata: metadata.clear(),
        "not JSON": lambda tensors, metadata: metadata.update({METADATA_KEY: "{"}),
        "another version": lambda tensors, metadata: info(metadata).update(version=2),
        "an unknown field": lambda tensors, metadata: info(metadata).update(extra=1),
        "a tensor less": lambda tensors, metadata: tensors.pop(some),
        "a tensor more": lambda tensors, metadata: tensors.update(other=torch.ones(1)),
        "another shape": lambda tensors, metadata: tensors.update({some: tensors[some][:-1].clone()}),
        "another dtype": lambda tensors, metadata: tensors.update({some: tensors[some].half()}),
        "two tasks of one name": lambda tensors, metadata: info(metadata).update(tasks=["a", "a", "b"]),
        "a task too few": lambda tensors, metadata: info(metadata).update(tasks=["a", "b"]),
    }
    for number, (what, change) in enumerate(changes.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = rewritten(result, folder, change)
        error = refusal(lambda path=path: BasisFile(path), "basis_invalid")
        assert error.where["file"].endswith(BASIS_NAME), what


def test_values_that_are_not_finite_are_refused(result: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
        tensors[min(tensors)].view(-1)[0] = float("nan")

    path = rewritten(result, tmp_path, damage)
    refusal(lambda: basis.recover(path, 0, tmp_path / "out"), "non_finite_tensor")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_basis_is_refused(examples_dir: Path, tmp_path: Path) -> None:
    refusal(lambda: BasisFile(tmp_path), "basis_not_found")
    weights = examples_dir / "adapters" / "icd" / "adapter_model.safetensors"
    refusal(lambda: BasisFile(weights), "basis_invalid")
