"""Whether adapters can be merged with each other, told from their headers alone. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from merging.errors import InputError
from merging.formats.families import common_family, common_parameters
from merging.formats.image_meta import check_architecture
from merging.formats.loaded import Adapter, Module
from merging.formats.peft_config import AdapterConfig
from merging.formats.saved import FullTensor, SaveChoice, full_tensors, saved_modules, some


@dataclass(frozen=True, slots=True)
class Compatibility:
    """What a set of adapters has in common.

    ``family`` is a key of :data:`merging.formats.families.FAMILIES`. ``modules`` maps each module (sorted)
    to the indices of the adapters that have it; ``full_tensors`` maps the fully trained tensors of the
    result to their sources; ``modules_to_save`` names their modules as PEFT's configuration does. Base,
    revision and task type are None unless the adapters agree. ``anchored_targets`` tells that some adapter
    chose its layers by more than a list of name endings, so that such a list may not describe them.
    """

    family: str
    modules: Mapping[str, tuple[int, ...]]
    full_tensors: Mapping[str, FullTensor]
    modules_to_save: tuple[str, ...]
    base_model: str | None
    base_revision: str | None
    task_type: str | None
    fan_in_fan_out: bool
    anchored_targets: bool
    target_parameters: tuple[str, ...]
    warnings: tuple[str, ...]


def check_compatible(
    adapters: Sequence[Adapter],
    *,
    missing_modules: Literal["error", "zero"] = "error",
    modules_to_save: SaveChoice = "error",
    allow_base_mismatch: bool = False,
) -> Compatibility:
    """Check that the adapters are updates of the same layers of the same base.

    Raises :class:`InputError`: ``mixed_families``, ``mixed_spellings``, ``base_model_mismatch``,
    ``missing_modules``, ``shape_mismatch``, ``layer_mismatch``, ``modules_to_save_choice``,
    ``modules_to_save_missing``, ``target_parameters_mismatch``, ``no_adapters``.
    """
    if not adapters:
        raise InputError("no_adapters", "there is no adapter to merge")
    warnings: list[str] = []
    family = common_family(adapters)
    parameters = common_parameters(adapters)
    base, revision = _base(adapters, allow_base_mismatch, warnings)
    check_architecture(adapters, allow_base_mismatch, warnings)
    modules = _modules(adapters)
    for name, present in modules.items():
        for index in present[1:]:
            _check_same(adapters[present[0]], adapters[index], name)
    _check_missing(adapters, modules, missing_modules, warnings)
    full = full_tensors(adapters, modules_to_save, warnings)
    configs = [adapter.config for adapter in adapters if adapter.config is not None]
    tasks = {config.task_type for config in configs}
    return Compatibility(
        family=family,
        modules=MappingProxyType(modules),
        full_tensors=MappingProxyType(full),
        modules_to_save=saved_modules(adapters, full),
        base_model=base,
        base_revision=revision,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        anchored_targets=any(map(_anchored, configs)),
        target_parameters=parameters,
        warnings=tuple(warnings),
    )


def _anchored(config: AdapterConfig) -> bool:
    return not isinstance(config.target_modules, tuple) or bool(
        config.exclude_modules or config.layers_to_transform is not None
    )


def _base(
    adapters: Sequence[Adapter], allow_mismatch: bool, warnings: list[str]
) -> tuple[str | None, str | None]:
    """The base and revision that all adapters agree on. Revision ``main`` is the same as none."""
    stated = [adapter for adapter in adapters if adapter.base_model]
    bases: dict[tuple[str, str | None], int] = {}
    for index, adapter in enumerate(stated):
        bases.setdefault(((adapter.base_model or "").rstrip("/"), _revision(adapter)), index)
    if len(bases) > 1:
        shown = ", ".join(
            f"{name}{'@' + revision if revision else ''} ({stated[first].label})"
            for (name, revision), first in bases.items()
        )
        if not allow_mismatch:
            raise InputError(
                "base_model_mismatch",
                f"the adapters were trained on different base models: {shown}",
                remedy="Merge adapters of one base, or set allow_base_mismatch if the bases are the same",
                where={"field": "base_model_name_or_path"},
            )
        warnings.append(f"the adapters name different base models: {shown}")
        return None, None
    if 0 < len(stated) < len(adapters):
        silent = [adapter.label for adapter in adapters if not adapter.base_model]
        warnings.append(f"these adapters do not name their base model: {some(silent)}")
    return next(iter(bases), (None, None))


def _revision(adapter: Adapter) -> str | None:
    return None if adapter.base_revision in (None, "", "main") else adapter.base_revision


def _modules(adapters: Sequence[Adapter]) -> dict[str, tuple[int, ...]]:
    """Module -> the adapters that have it, sorted by module."""
    found: dict[str, list[int]] = {}
    for index, adapter in enumerate(adapters):
        for name in adapter.modules:
            found.setdefault(name, []).append(index)
    return {name: tuple(found[name]) for name in sorted(found)}


def _check_same(one: Adapter, other: Adapter, name: str) -> None:
    """Both modules must be the same layer of the base."""
    a, b = one.modules[name], other.modules[name]
    where = {"module": name, "model": other.label}
    if a.kind != b.kind or a.fan_in_fan_out != b.fan_in_fan_out:
        raise InputError(
            "layer_mismatch",
            f"module {name} is {_layer(a)} in {one.label} and {_layer(b)} in {other.label}",
            remedy="The adapters belong to different base models or differ in fan_in_fan_out",
            where=where,
        )
    if (a.m, a.n, a.weight_shape) == (b.m, b.n, b.weight_shape):
        return
    if a.kind == "embedding" and a.m == b.m:
        raise InputError(
            "shape_mismatch",
            f"module {name} has a vocabulary of {a.n} in {one.label} and of {b.n} in {other.label}",
            remedy="One of the adapters was trained with a resized vocabulary; merge only adapters "
            "with the same one",
            where=where,
        )
    raise InputError(
        "shape_mismatch",
        f"module {name} has the weight shape {a.weight_shape} in {one.label} and {b.weight_shape} in "
        f"{other.label}",
        remedy="Merge adapters of one base model",
        where=where,
    )


def _layer(module: Module) -> str:
    return f"a transposed {module.kind}" if module.fan_in_fan_out else f"a {module.kind}"


def _check_missing(
    adapters: Sequence[Adapter],
    modules: Mapping[str, tuple[int, ...]],
    policy: str,
    warnings: list[str],
) -> None:
    partial = [name for name, present in modules.items() if len(present) < len(adapters)]
    if not partial:
        return
    if policy != "zero":
        first = modules[partial[0]]
        lacking = next(i for i in range(len(adapters)) if i not in first)
        raise InputError(
            "missing_modules",
            f"{len(partial)} of {len(modules)} modules are not in every adapter "
            f"({adapters[lacking].label} lacks {partial[0]}): {some(partial)}",
            remedy="Set missing_modules: zero to treat a missing module as no change",
            where={"module": partial[0], "model": adapters[lacking].label, "field": "missing_modules"},
        )
    warnings.append(f"{len(partial)} modules are not in every adapter and count as zero: {some(partial)}")
