"""The file format of reversible merging.

``basis.safetensors`` holds the six tensors of :class:`merging.methods.rmm.Basis` for every module, named
``<module>.mean_A`` and so on, and a description (tasks, shapes, base model) in the metadata of its header.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from merging.catalog.named import RmmParams
from merging.errors import InputError
from merging.formats.guard import check_safetensors
from merging.formats.loaded import Module
from merging.formats.peft_keys import Kind
from merging.formats.tensors import TensorFile
from merging.formats.writer import TensorSpec, write_safetensors
from merging.methods import rmm
from merging.preparing import Prepared

BASIS_NAME = "basis.safetensors"
METADATA_KEY = "merganser.basis"
FLOATS = ("F64", "F32", "F16", "BF16")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BasisModule(_Strict):
    """One module: its layer, the rank ``r`` and basis size ``p`` kept for it, and the tasks that have it."""

    kind: Kind
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    weight_shape: tuple[int, ...]
    rank: int = Field(ge=1)
    size_B: int = Field(ge=0)  # noqa: N815
    size_A: int = Field(ge=0)  # noqa: N815
    tasks: tuple[int, ...]


class BasisInfo(_Strict):
    """What the header says: the labels of the tasks, how the basis was made, and the layers it is for.

    ``lambda_`` multiplies every recovered update, as it did the adapters written with the basis.
    """

    version: Literal[1] = 1
    tasks: tuple[str, ...] = Field(min_length=1)
    granularity: Literal["position", "factor"]
    align: Literal["none", "procrustes"]
    lambda_: float = Field(default=1.0, allow_inf_nan=False)
    base_model: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    anchored_targets: bool = False
    modules: Mapping[str, BasisModule] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> BasisInfo:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("two tasks have one name")
        for name, module in self.modules.items():
            if list(module.tasks) != sorted(set(module.tasks)) or not module.tasks:
                raise ValueError(f"{name}: the tasks are not an ascending list")
            if module.tasks[0] < 0 or module.tasks[-1] >= len(self.tasks):
                raise ValueError(f"{name}: there is no such task")
        return self

    def specs(self, dtype: str) -> list[TensorSpec]:
        """The tensors of the file, in order."""
        whole = self.granularity == "factor"
        specs = []
        for name, module in sorted(self.modules.items()):
            r, T = module.rank, len(module.tasks)
            for side, positions, p in (("A", module.n, module.size_A), ("B", module.m, module.size_B)):
                shapes = {
                    "mean": (positions, r),
                    "basis": (positions, r, p),
                    "coeff": (1 if whole else positions, p, T),
                }
                specs += [TensorSpec(f"{name}.{part}_{side}", dtype, shape) for part, shape in shapes.items()]
        return specs


def describe(prepared: Prepared, tasks: Sequence[str], shape: Callable[[str], tuple[int, ...]]) -> BasisInfo:
    """The description of the basis of a merge; ``shape`` gives that of a tensor by its name in the file."""
    params = prepared.resolved.params
    assert isinstance(params, RmmParams)
    table = prepared.table
    return BasisInfo(
        tasks=tuple(tasks),
        granularity=params.granularity,
        align=params.align,
        lambda_=float(params.lambda_),
        base_model=table.base_model,
        base_revision=table.base_revision,
        task_type=table.task_type,
        fan_in_fan_out=table.fan_in_fan_out,
        anchored_targets=table.anchored_targets,
        modules={
            name: _entry(prepared.module(name), present, shape) for name, present in table.modules.items()
        },
    )


def _entry(module: Module, tasks: tuple[int, ...], shape: Callable[[str], tuple[int, ...]]) -> BasisModule:
    return BasisModule(
        kind=module.kind,
        m=module.m,
        n=module.n,
        weight_shape=module.weight_shape,
        rank=shape(f"{module.name}.mean_A")[-1],
        size_B=shape(f"{module.name}.basis_B")[-1],
        size_A=shape(f"{module.name}.basis_A")[-1],
        tasks=tasks,
    )


def write_basis(
    path: Path,
    info: BasisInfo,
    load: Callable[[str], Tensor],
    *,
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Stream a basis into a new file; its sha256. ``load`` gives the tensor of a name, without ``G``."""
    specs = info.specs(dtype)
    head = {"format": "pt", **(metadata or {}), METADATA_KEY: info.model_dump_json()}
    return write_safetensors(path, specs, (load(spec.name) for spec in specs), head)


class BasisFile:
    """An opened basis; only its header has been read.

    ``path`` is the file or the folder that holds it. Raises :class:`InputError` ``basis_not_found``,
    ``basis_invalid``, and the codes of :mod:`merging.formats.guard`.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.path = path / BASIS_NAME if path.is_dir() else path
        if not self.path.is_file():
            raise InputError(
                "basis_not_found",
                f"there is no {BASIS_NAME} at {path}",
                remedy="Give the result directory of an `rmm` merge or its basis file.",
                where={"file": str(path)},
            )
        header = check_safetensors(self.path)
        self.metadata = dict(header.metadata)
        self._file = TensorFile(self.path, header)
        text = self.metadata.pop(METADATA_KEY, None)
        if text is None:
            raise self._invalid("it does not describe a basis")
        try:
            self.info = BasisInfo.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise self._invalid(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        wanted = {spec.name: spec.shape for spec in self.info.specs("F32")}
        found = {name: tensor.shape for name, tensor in header.tensors.items()}
        if found != wanted:
            wrong = sorted(
                name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
            )
            raise self._invalid(f"tensor {wrong[0]} does not fit the description")
        dtypes = {tensor.dtype for tensor in header.tensors.values()}
        if len(dtypes) != 1 or not dtypes <= set(FLOATS):
            raise self._invalid(f"its tensors have the types {sorted(dtypes)}")
        self.dtype = dtypes.pop()

    def basis(self, name: str, dtype: torch.dtype | None = None) -> rmm.Basis:
        """The basis of one module (``G = 1``), at least in float32. Raises ``non_finite_tensor``."""
        if dtype is None:
            dtype = torch.float64 if self.dtype == "F64" else torch.float32
        parts = {}
        for part in rmm.TENSORS:
            tensor = self._file.tensor(f"{name}.{part}").to(dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    "non_finite_tensor",
                    f"{self.path.name}: tensor {name}.{part} holds NaN or infinite values",
                    remedy="The file is damaged; merge again.",
                    where={"file": str(self.path), "module": name},
                )
            parts[part] = tensor.unsqueeze(0)
        return rmm.Basis(**parts)

    def task(self, wanted: str | int) -> int:
        """The index of a task by its label, the last part of its label, or its number."""
        labels = self.info.tasks
        if isinstance(wanted, int):
            matches = [wanted] if 0 <= wanted < len(labels) else []
        else:
            matches = [t for t, label in enumerate(labels) if label == wanted]
            matches = matches or [t for t, label in enumerate(labels) if Path(label).name == wanted]
        if len(matches) != 1:
            raise InputError(
                "unknown_task",
                f"the basis has no single task {wanted!r}",
                remedy=f"It has: {', '.join(labels)}.",
                where={"file": str(self.path), "field": "task"},
            )
        return matches[0]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _invalid(self, reason: str) -> InputError:
        return InputError(
            "basis_invalid",
            f"{self.path.name} is not a valid basis: {reason}",
            remedy="Give the basis.safetensors of an `rmm` merge as it was written.",
            where={"file": str(self.path)},
        )
