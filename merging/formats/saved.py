"""What a merge does with fully trained tensors beside the LoRA (``modules_to_save``). No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from merging.errors import InputError
from merging.formats.loaded import Adapter
from merging.formats.peft_in import HEADS
from merging.formats.shapes import FACTOR_DTYPES

_SHOWN = 10


class Take(Protocol):
    """The choice to copy fully trained tensors from one model (``merging.recipe.TakeFrom``)."""

    @property
    def take(self) -> str:
        """The reference of the model."""


SaveChoice = Literal["error", "drop", "average", "own"] | Mapping[str, str] | Take
"""What becomes of fully trained tensors; with ``own`` each adapter keeps its own, outside of the merge."""


@dataclass(frozen=True, slots=True)
class FullTensor:
    """A fully trained tensor of the result: the mean of those of the ``sources`` (indices of adapters)."""

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[int, ...]


def saved_modules(adapters: Sequence[Adapter], full: Iterable[str]) -> tuple[str, ...]:
    """The modules that the fully trained tensors ``full`` belong to, by the adapters' configurations."""
    tensors = tuple(full)
    saved = {
        name
        for adapter in adapters
        if adapter.config is not None
        for name in (*(adapter.config.modules_to_save or ()), *HEADS.get(adapter.config.task_type or "", ()))
    }
    return tuple(sorted(name for name in saved if any(f".{name}." in f".{tensor}" for tensor in tensors)))


def full_tensors(
    adapters: Sequence[Adapter], choice: SaveChoice, warnings: list[str]
) -> dict[str, FullTensor]:
    """The fully trained tensors of the result, by the user's choice."""
    found: dict[str, list[int]] = {}
    for index, adapter in enumerate(adapters):
        for name in adapter.full_tensors:
            found.setdefault(name, []).append(index)
    names = sorted(found)
    if choice not in ("error", "drop", "average", "own"):
        return _taken(adapters, choice)
    if not names or choice == "own":
        return {}
    if choice == "error":
        owner = adapters[found[names[0]][0]].label
        raise InputError(
            "modules_to_save_choice",
            f"{owner} has fully trained tensors beside its LoRA ({some(names)}), which replace those of "
            "the base",
            remedy="Set modules_to_save to drop, average, or {take: MODEL}",
            where={"model": owner, "field": "modules_to_save"},
        )
    if choice == "drop":
        warnings.append(f"{len(names)} fully trained tensors were dropped: {some(names)}")
        return {}
    result = {}
    for name in names:
        sources = found[name]
        if len(sources) < len(adapters):
            lacking = next(i for i in range(len(adapters)) if i not in sources)
            raise _save_missing(adapters[lacking].label, name)
        result[name] = _averaged(adapters, name, tuple(sources))
    return result


def _averaged(adapters: Sequence[Adapter], name: str, sources: tuple[int, ...]) -> FullTensor:
    infos = [adapters[index].full_tensors[name] for index in sources]
    for index, info in zip(sources, infos, strict=True):
        if info.shape != infos[0].shape:
            raise InputError(
                "shape_mismatch",
                f"the fully trained tensor {name} has shape {infos[0].shape} in {adapters[sources[0]].label} "
                f"and {info.shape} in {adapters[index].label}",
                remedy="Set modules_to_save to drop or {take: MODEL}",
                where={"module": name, "model": adapters[index].label},
            )
    dtypes = {info.dtype for info in infos}
    if not dtypes <= set(FACTOR_DTYPES):
        raise InputError(
            "modules_to_save_choice",
            f"the fully trained tensor {name} is {', '.join(sorted(dtypes))}, which has no average",
            remedy="Set modules_to_save to drop or {take: MODEL}",
            where={"module": name, "field": "modules_to_save"},
        )
    return FullTensor(dtypes.pop() if len(dtypes) == 1 else "F32", infos[0].shape, sources)


def _taken(adapters: Sequence[Adapter], choice: SaveChoice) -> dict[str, FullTensor]:
    """All fully trained tensors of one model."""
    model = choice.get("take", "") if isinstance(choice, Mapping) else getattr(choice, "take", "")
    index = next((i for i, adapter in enumerate(adapters) if adapter.label == model), None)
    if index is None:
        raise InputError(
            "modules_to_save_missing",
            f"modules_to_save takes from {model!r}, which is not one of the models",
            remedy="Name one of the models of the recipe",
            where={"model": str(model), "field": "modules_to_save"},
        )
    tensors = adapters[index].full_tensors
    if not tensors:
        raise _save_missing(adapters[index].label, "any fully trained tensor")
    return {name: FullTensor(info.dtype, info.shape, (index,)) for name, info in tensors.items()}


def _save_missing(label: str, what: str) -> InputError:
    return InputError(
        "modules_to_save_missing",
        f"{label} does not have {what}",
        remedy="Set modules_to_save to drop, or take from a model that has it",
        where={"model": label, "field": "modules_to_save"},
    )


def some(names: Sequence[str]) -> str:
    """The first names, for a message."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown
