"""Streaming writer and the result directory."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from merging.errors import InputError, MergeFailure
from merging.formats.guard import check_safetensors
from merging.formats.writer import ResultDirectory, TensorSpec, write_safetensors

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def specs_of(tensors: dict[str, Tensor], dtype: str) -> list[TensorSpec]:
    return [TensorSpec(name, dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 5), "a": (7,), "scalar": (), "empty": (0, 4), "c.d": (2, 3, 1, 1)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_the_library_reads_what_was_written(dtype: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    digest = write_safetensors(path, specs_of(tensors, dtype), tensors.values(), {"format": "pt", "k": 'ü"'})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    read = safetensors.torch.load_file(path)
    assert sorted(read) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.to(TORCH[dtype]))
    header = check_safetensors(path)
    assert list(header.tensors) == list(tensors)
    assert header.metadata == {"format": "pt", "k": 'ü"'}
    assert header.data_start % 8 == 0


def test_mixed_dtypes_are_aligned_though_given_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    kinds = {"h": ("F16", 3), "d": ("F64", 2), "b": ("U8", 1), "f": ("F32", 1)}
    specs = [TensorSpec(name, dtype, (size,)) for name, (dtype, size) in kinds.items()]
    given = [torch.full(spec.shape, i + 1) for i, spec in enumerate(specs)]
    write_safetensors(path, specs, given, {})
    for info in check_safetensors(path).tensors.values():
        assert info.begin % {"F64": 8, "F32": 4, "F16": 2, "U8": 1}[info.dtype] == 0
    read = safetensors.torch.load_file(path)
    assert [read[spec.name][0].item() for spec in specs] == [1, 2, 3, 4]


def test_the_bytes_depend_on_nothing_else(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    specs = specs_of(tensors, "F32")
    one = write_safetensors(tmp_path / "1", specs, tensors.values(), {"a": "1", "b": "2"})
    views = (tensor.clone().unsqueeze(-1).expand(*tensor.shape, 2)[..., 1] for tensor in tensors.values())
    assert write_safetensors(tmp_path / "2", specs, views, {"b": "2", "a": "1"}) == one


def test_at_most_one_tensor_is_held(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def produce() -> Iterator[Tensor]:
        for _ in range(5):
            gc.collect()
            assert not [ref for ref in alive if ref() is not None]
            memory = np.ones(4, dtype=np.float32)  # lives as long as any view of the tensor's storage
            alive.append(weakref.ref(memory))
            tensor = torch.from_numpy(memory)
            del memory
            yield tensor
            del tensor

    write_safetensors(tmp_path / "a", [TensorSpec(f"t{i}", "F32", (4,)) for i in range(5)], produce(), {})
    assert len(alive) == 5


@pytest.mark.parametrize(
    ("values", "dtype", "code"),
    [
        ([1.0, float("nan")], "F32", "result_not_finite"),
        ([1.0, float("inf")], "F16", "result_not_finite"),
        ([1.0, 70000.0], "F16", "result_overflow"),
        ([1.0, -1e39], "F32", "result_overflow"),
        ([1.0, 3.4e38], "BF16", "result_overflow"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(
    values: list[float], dtype: str, code: str, tmp_path: Path
) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    with pytest.raises(MergeFailure) as caught:
        write_safetensors(tmp_path / "a", [TensorSpec("t", dtype, (2,))], [tensor], {})
    assert caught.value.code == code
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("specs", "shapes"),
    [
        ([TensorSpec("a", "F32", (2,))], [(3,)]),
        ([TensorSpec("a", "F32", (2,))], []),
        ([TensorSpec("a", "F32", (2,))], [(2,), (2,)]),
        ([TensorSpec("a", "F32", (2,)), TensorSpec("a", "F32", (2,))], [(2,), (2,)]),
    ],
)
def test_tensors_must_fit_their_specs(
    specs: list[TensorSpec], shapes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        write_safetensors(tmp_path / "a", specs, [torch.ones(shape) for shape in shapes], {})
    assert not (tmp_path / "a").exists()


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "a", [TensorSpec("t", "F32", (1,))], [torch.ones(1)], {})
    assert (tmp_path / "a").read_text() == "mine"


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_result_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with ResultDirectory(out) as result:
        assert result.path.parent == out.parent
        assert result.path.name.startswith(".out.part-")
        (result.path / "sub").mkdir()
        (result.path / "sub" / "file").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x"
    assert listing(out.parent) == ["out"]


def fail_inside(out: Path, *, overwrite: bool = False) -> None:
    with ResultDirectory(out, overwrite=overwrite) as result:
        (result.path / "file").write_text("x")
        raise RuntimeError


def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail_inside(tmp_path / "out")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_existing_result_is_not_overwritten(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    with pytest.raises(InputError) as caught, ResultDirectory(out):
        pytest.fail("entered")
    assert caught.value.code == "output_exists"
    assert listing(tmp_path) == before


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with ResultDirectory(tmp_path / "out") as result:
        (result.path / "file").write_text("x")
    assert listing(tmp_path / "out") == ["file"]


def test_overwriting_replaces_the_whole_folder_but_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(RuntimeError):
        fail_inside(out, overwrite=True)
    assert listing(out) == ["old"]
    with ResultDirectory(out, overwrite=True) as result:
        (result.path / "new").write_text("x")
        assert listing(out) == ["old"]
    assert listing(out) == ["new"]
    assert listing(tmp_path) == ["out"]


def test_a_result_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def overtaken() -> None:
        with ResultDirectory(out):
            out.mkdir()
            (out / "theirs").write_text("x")

    with pytest.raises(InputError):
        overtaken()
    assert listing(tmp_path) == ["out"]
    assert listing(out) == ["theirs"]


KILLED = """
import sys, time, torch
from pathlib import Path
from merging.formats.writer import ResultDirectory, TensorSpec, write_safetensors

def slow():
    yield torch.ones(1 << 20)
    print("writing", flush=True)
    time.sleep(600)

with ResultDirectory(Path(sys.argv[1])) as result:
    write_safetensors(result.path / "w", [TensorSpec(n, "F32", (1 << 20,)) for n in "ab"], slow(), {})
"""


def test_a_killed_writer_leaves_nothing_visible_and_the_next_one_clears_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        in_use = listing(tmp_path)
        with ResultDirectory(tmp_path / "other") as other:
            assert set(in_use) < set(listing(tmp_path))
            assert other.path.exists()
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert not out.exists()
    assert [name for name in listing(tmp_path) if not name.startswith(".")] == ["other"]
    with ResultDirectory(out) as result:
        assert listing(tmp_path) == [result.path.name, "other"]
    assert listing(tmp_path) == ["other", "out"]


def test_two_writers_of_one_result_do_not_clear_up_each_other(tmp_path: Path) -> None:
    with ResultDirectory(tmp_path / "out") as one:
        with pytest.raises(RuntimeError):
            fail_inside(tmp_path / "out")
        assert one.path.exists()
    assert listing(tmp_path) == ["out"]


def test_an_overwrite_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    token = "0123456789ab"
    for name in (f".out.part-{token}", f".out.part-{token}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name[-4:]).write_text("x")
    with pytest.raises(InputError) as caught, ResultDirectory(tmp_path / "out"):
        pytest.fail("entered")
    assert caught.value.code == "output_exists"
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == [".old"]


def test_an_overwrite_in_progress_is_left_alone(tmp_path: Path) -> None:
    """Between its two renames the old result lies beside the output, which is missing for a moment."""
    with ResultDirectory(tmp_path / "out") as one:
        old = one.path.with_name(one.path.name + ".old")
        old.mkdir()
        with ResultDirectory(tmp_path / "out") as two:
            assert old.exists()
            assert one.path.exists()
            (two.path / "file").write_text("x")
        old.rmdir()
        (tmp_path / "out" / "file").unlink()
    assert listing(tmp_path) == ["out"]
