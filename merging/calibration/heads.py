"""Classification heads: where each task's head comes from, checked by headers alone. No torch at import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from merging.errors import InputError
from merging.formats.adapter import Adapter
from merging.formats.guard import check_safetensors
from merging.formats.tensors import TensorFile

if TYPE_CHECKING:
    import torch

NAMES = ("weight", "head")
"""What the matrix of a head file may be called; ``bias`` may stand beside it."""

GENERATIVE = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "QUESTION_ANS")
HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "projection_dim")


@dataclass(frozen=True)
class Head:
    """The head of one task: a file with one linear layer, or fully trained tensors of its adapter.

    ``classes`` is the number of logits; ``digest`` that of the file, None for the adapter's own.
    """

    classes: int
    file: TensorFile | None = None
    adapter: Adapter | None = None
    digest: str | None = None

    def linear(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``weight (K, d)`` and ``bias (K,)`` of a head file, float32."""
        assert self.file is not None
        names = self.file.header.tensors
        weight = self.file.tensor(next(name for name in NAMES if name in names)).float()
        bias = self.file.tensor("bias").float() if "bias" in names else None
        for tensor in (weight, bias):
            if tensor is not None and not math.isfinite(float(tensor.abs().sum())):
                _fail("head_not_finite", self.file.path.name, "holds NaN or infinite values")
        return weight, bias

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fully trained tensors of the adapter, by their names in the model, float32."""
        assert self.adapter is not None
        return {name: self.adapter.full_tensor(name).float() for name in self.adapter.full_tensors}


def open_head(path: Path) -> Head:
    """A head file. Raises ``head_invalid``, ``entropy_undefined``."""
    if not path.is_file():
        _fail("head_not_found", path.name, "does not exist")
    header = check_safetensors(path)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    names = [name for name in NAMES if name in shapes]
    if len(names) != 1 or len(shapes[names[0]]) != 2 or set(shapes) - {names[0], "bias"}:
        _fail(
            "head_invalid",
            path.name,
            f"must hold a matrix `weight` and may hold `bias`; it has {sorted(shapes)}",
        )
    classes = shapes[names[0]][0]
    if "bias" in shapes and shapes["bias"] != (classes,):
        _fail("head_invalid", path.name, f"has {classes} rows and a bias of shape {shapes['bias']}")
    _check_classes(classes, path.name)
    with path.open("rb") as file:
        import hashlib

        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Head(classes, file=TensorFile(path, header), digest=digest)


def own_head(adapter: Adapter) -> Head:
    """The head that an adapter brings. Raises ``heads_missing``, ``entropy_undefined``."""
    task_type = adapter.config.task_type if adapter.config is not None else None
    found = classifier_rows(adapter)
    if not found:
        if task_type in GENERATIVE:
            _fail(
                "entropy_undefined",
                adapter.label,
                f"is of the type {task_type}: generation has no classes whose entropy could be minimised",
                "Use classifiers; entropy over label words is not supported.",
            )
        _fail(
            "heads_missing",
            adapter.label,
            "brings no classification head",
            "Give `head` for the model, or train with modules_to_save.",
        )
    classes = next(iter(found.values()))
    _check_classes(classes, adapter.label)
    return Head(classes, adapter=adapter)


def classifier_rows(adapter: Adapter) -> Mapping[str, int]:
    """Rows of the last matrix of a classification head among the fully trained tensors."""
    wanted = ("classifier", "score")
    matrices = {
        name: info.shape[0]
        for name, info in adapter.full_tensors.items()
        if len(info.shape) == 2 and any(f".{part}." in f".{name}" for part in wanted)
    }
    last = [name for name in matrices if name.endswith("out_proj.weight")] or list(matrices)[-1:]
    return {name: matrices[name] for name in last}


def hidden_size(config: Mapping[str, object]) -> int | None:
    """The width of the features, where the configuration of a base model states it."""
    for name in HIDDEN_SIZES:
        value = config.get(name)
        if isinstance(value, int):
            return value
    return None


def check_width(head: Head, config: Mapping[str, object]) -> None:
    """Raise ``head_shape_mismatch`` for a head file that does not fit the base model."""
    width = hidden_size(config)
    if head.file is None or width is None:
        return
    name = next(name for name in NAMES if name in head.file.header.tensors)
    found = head.file.header.tensors[name].shape[1]
    if found != width:
        _fail(
            "head_shape_mismatch",
            head.file.path.name,
            f"is for features of size {found}; the base gives {width}",
        )


def _check_classes(classes: int, name: str) -> None:
    if classes < 2:
        _fail(
            "entropy_undefined",
            name,
            f"has {classes} output: the entropy of a regression is not defined",
            "Leave regression tasks out.",
        )


def _fail(code: str, name: str, what: str, remedy: str | None = None) -> NoReturn:
    raise InputError(
        code, f"head of {name}: {name} {what}", remedy=remedy, where={"model": name, "field": "head"}
    )
