"""Task-vector files: what was added to a base, tensor by tensor. No torch here.

A task vector has the tensor names of its base, or some of them, and holds differences. Nothing in the numbers
tells them from weights, so the header must say it: ``merge.kind`` is ``task_vector``. ``merge.base_sha256``
names the content of the base, where the writer knew it.
"""

from __future__ import annotations

from pathlib import Path

from merging.errors import InputError
from merging.formats.checkpoint_in import refuse_quantised
from merging.formats.guard import check_safetensors
from merging.formats.tensor_set import TensorSet, open_file, open_files
from merging.formats.tensors import TensorFile

STEM = "delta"
KIND_KEY = "merge.kind"
KIND = "task_vector"
BASE_KEY = "merge.base_sha256"


def holds_task_vector(path: Path) -> bool:
    """Whether a path is a folder with a task vector, or a file whose header says so.

    Raises the guard's errors for a file that is no safetensors file.
    """
    if path.is_dir():
        return (path / f"{STEM}.safetensors").exists() or (path / f"{STEM}.safetensors.index.json").exists()
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    return check_safetensors(path).metadata.get(KIND_KEY) == KIND


def open_task_vector(path: str | Path, *, label: str | None = None) -> TensorSet:
    """Open the task vector at ``path``: a folder or a file.

    Raises :class:`InputError` ``task_vector_unmarked`` when a header does not state its kind, and what
    :func:`~merging.formats.tensor_set.open_files` raises.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    label = label or (path if path.is_dir() else path.with_suffix("")).resolve().name
    files = open_files(folder, STEM) if path.is_dir() else (open_file(folder, path.name),)
    for file in files:
        _check(file, label)
    found = TensorSet(label=label, path=folder, kind="task_vector", files=files)
    refuse_quantised(found.infos, None, label)
    return found


def _check(file: TensorFile, label: str) -> None:
    if file.header.metadata.get(KIND_KEY) != KIND:
        raise InputError(
            "task_vector_unmarked",
            f"the header of {file.path.name} does not say that it is a task vector",
            remedy=f"Write {KIND_KEY} = {KIND} into its metadata if its tensors are differences to a base",
            where={"file": file.path.name, "model": label, "field": KIND_KEY},
        )
