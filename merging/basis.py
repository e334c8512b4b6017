"""Reversible merging on files: bring a task's adapter back from a basis, or add a task to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from merging.basis_file import BASIS_NAME, BasisFile, BasisInfo, write_basis
from merging.errors import InputError
from merging.formats import peft_out
from merging.formats.adapter import Adapter, open_adapter
from merging.formats.writer import ResultDirectory, write_safetensors
from merging.methods import rmm
from merging.updates import UpdateStack


def recover(
    path: str | Path,
    task: str | int,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write one task's adapter in PEFT's format into ``out_dir``; file names to sha256 digests.

    ``dtype`` (``F32``, ``F16``, ``BF16``) defaults to that of the basis. Cost ``O((m + n) r p)`` per module.
    """
    with BasisFile(path) as file, ResultDirectory(Path(out_dir), overwrite=overwrite) as result:
        return write_task(file, file.task(task), result.path, dtype=dtype)


def write_task(file: BasisFile, task: int, folder: Path, *, dtype: str | None = None) -> dict[str, str]:
    """The adapter of task number ``task`` into an existing folder."""
    info = file.info
    dtype = dtype or file.dtype
    present = {name: module for name, module in info.modules.items() if task in module.tasks}
    ranks = peft_out.result_ranks({name: module.rank for name, module in present.items()})
    modules = [
        peft_out.ResultModule(name, module.kind, module.m, module.n, ranks[name], module.weight_shape)
        for name, module in sorted(present.items())
    ]

    def tensors() -> Iterator[Tensor]:
        for module in modules:
            B, A = rmm.recover(file.basis(module.name), present[module.name].tasks.index(task))
            yield from peft_out.factor_tensors(module, B[0] * info.lambda_, A[0])

    config = peft_out.adapter_config(
        modules,
        base_model=info.base_model,
        revision=info.base_revision,
        task_type=info.task_type,
        fan_in_fan_out=info.fan_in_fan_out,
        anchored_targets=info.anchored_targets,
    )
    specs = [spec for module in modules for spec in peft_out.factor_specs(module, dtype)]
    metadata = {"format": "pt", **{key: value for key, value in file.metadata.items() if key != "format"}}
    return {
        peft_out.CONFIG_NAME: peft_out.write_adapter_config(folder, config),
        peft_out.WEIGHTS_NAME: write_safetensors(folder / peft_out.WEIGHTS_NAME, specs, tensors(), metadata),
    }


def add_task(
    path: str | Path,
    adapter: str | Path,
    out_dir: str | Path,
    *,
    label: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """A new basis in ``out_dir`` with one more task, projected onto the old basis without a new fit.

    Gives ``{"task", "recon_error": {module: relative error}, "files"}``. The other tasks stay exactly as
    they are. Raises ``task_exists``, ``missing_modules``, ``unexpected_modules``, ``shape_mismatch`` and
    ``rank_exceeds_basis``.
    """
    with BasisFile(path) as file, open_adapter(adapter, label=label) as model:
        _check_fits(file, model)
        info = _with_task(file.info, model.label)
        made: dict[str, Tensor] = {}
        errors: dict[str, float] = {}

        def load(name: str) -> Tensor:
            """Modules come one after the other, so one at a time is held."""
            if name not in made:
                made.clear()
                module = name.rpartition(".")[0]
                basis, errors[module] = _extended(file, model, module)
                made.update({f"{module}.{part}": tensor[0] for part, tensor in basis.tensors().items()})
            return made[name]

        with ResultDirectory(Path(out_dir), overwrite=overwrite) as result:
            metadata = {key: value for key, value in file.metadata.items() if key != "format"}
            digest = write_basis(result.path / BASIS_NAME, info, load, dtype=file.dtype, metadata=metadata)
    return {"task": info.tasks[-1], "recon_error": errors, "files": {BASIS_NAME: digest}}


def _extended(file: BasisFile, model: Adapter, name: str) -> tuple[rmm.Basis, float]:
    basis = file.basis(name)
    B, A = (factor.unsqueeze(0) for factor in model.factors(name, dtype=basis.mean_A.dtype))
    try:
        extended = rmm.add_task(basis, B, A, align=file.info.align)
    except InputError as error:
        error.where.update(module=name, model=model.label)
        raise
    last = rmm.Basis(
        **{
            part: tensor[..., -1:] if part.startswith("coeff") else tensor
            for part, tensor in extended.tensors().items()
        }
    )
    return extended, float(rmm.recon_error(last, UpdateStack((name,), (0,), (B,), (A,)))[0, 0])


def _with_task(info: BasisInfo, label: str) -> BasisInfo:
    new = len(info.tasks)
    modules = {
        name: module.model_copy(update={"tasks": (*module.tasks, new)})
        for name, module in info.modules.items()
    }
    return info.model_copy(update={"tasks": (*info.tasks, label), "modules": modules})


def _check_fits(file: BasisFile, model: Adapter) -> None:
    """The adapter must have the layers of the basis, no fewer and no more."""
    info = file.info
    where = {"model": model.label, "file": str(file.path)}
    if model.label in info.tasks:
        raise InputError(
            "task_exists",
            f"the basis already has a task {model.label!r}",
            remedy="Give the new task another label.",
            where=where,
        )
    for code, names, what in (
        ("missing_modules", sorted(info.modules.keys() - model.modules.keys()), "lacks"),
        ("unexpected_modules", sorted(model.modules.keys() - info.modules.keys()), "has, beyond the basis,"),
    ):
        if names:
            raise InputError(
                code,
                f"{model.label} {what} {len(names)} modules, the first is {names[0]}",
                remedy="Fit a new basis with this adapter among the inputs.",
                where={**where, "module": names[0]},
            )
    for name, module in info.modules.items():
        own = model.modules[name]
        if (own.kind, own.m, own.n, own.weight_shape) != (
            module.kind,
            module.m,
            module.n,
            module.weight_shape,
        ):
            raise InputError(
                "shape_mismatch",
                f"{name} is {own.kind} {own.m}x{own.n} in {model.label} and {module.kind} "
                f"{module.m}x{module.n} in the basis",
                remedy="Add only adapters of the base model that the basis is for.",
                where={**where, "module": name},
            )
    if model.base_model and info.base_model and model.base_model != info.base_model:
        raise InputError(
            "base_model_mismatch",
            f"{model.label} was trained on {model.base_model}, the basis is for {info.base_model}",
            remedy="Add only adapters of the base model that the basis is for.",
            where=where,
        )
    if model.full_tensors:
        raise InputError(
            "modules_to_save_choice",
            f"{model.label} has fully trained modules, which a basis cannot hold",
            remedy="Add the adapter without them.",
            where=where,
        )
