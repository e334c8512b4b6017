"""The file families: whether inputs are of one, and how a result of each is written. No torch here.

A result is written in the family of its inputs. Names of one family cannot be turned into those of another
without the key table of the base model, so families are never mixed or converted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from merging.errors import InputError
from merging.formats import image_meta, image_out, peft_out
from merging.formats.image_keys import ORIGINAL
from merging.formats.loaded import Adapter
from merging.formats.peft_out import ResultModule
from merging.formats.source import DIFFUSERS_NAME
from merging.formats.writer import TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Family:
    """How to write one family.

    ``specs`` gives the tensors of a module in the order in which ``tensors`` makes them from B (m, k) and
    A (k, n), padded up to the module's rank, and from the alpha of the file
    (:func:`~merging.formats.image_out.common_alpha`); ``header`` the family's own metadata. ``library`` is
    the name of the library that loads it, as model cards give it.
    """

    name: str
    library: str
    weights_name: str
    specs: Callable[[ResultModule, str], tuple[TensorSpec, ...]]
    tensors: Callable[[ResultModule, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, ...]]
    header: Callable[[Sequence[Adapter], Sequence[ResultModule]], dict[str, str]]


def _without_alpha(
    module: ResultModule, B: torch.Tensor, A: torch.Tensor, alpha: int
) -> tuple[torch.Tensor, ...]:
    return peft_out.factor_tensors(module, B, A)


FAMILIES: Mapping[str, Family] = MappingProxyType({
    family.name: family
    for family in (
        Family(
            "peft", "peft", peft_out.WEIGHTS_NAME, peft_out.factor_specs, _without_alpha,
            lambda adapters, modules: {},
        ),
        Family(
            "kohya", "diffusers", image_out.KOHYA_NAME, image_out.kohya_specs, image_out.kohya_tensors,
            image_meta.kohya_header,
        ),
        Family(
            "diffusers", "diffusers", DIFFUSERS_NAME, image_out.diffusers_specs, _without_alpha,
            image_meta.diffusers_header,
        ),
    )
})  # fmt: skip


def common_family(adapters: Sequence[Adapter]) -> str:
    """The family of all adapters. Raises ``mixed_families`` and ``mixed_spellings``."""
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        first.setdefault(adapter.format, adapter)
    if len(first) > 1:
        shown = ", ".join(f"{adapter.label} is a {name} file" for name, adapter in first.items())
        raise InputError(
            "mixed_families",
            f"the adapters are of different file families: {shown}",
            remedy="Convert them to one family first; that needs the names of the base model's layers",
            where={"model": list(first.values())[1].label, "field": "models"},
        )
    family = next(iter(first))
    if family == "diffusers":
        _check_spellings(adapters)
    return family


def common_parameters(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """The bare parameters that are adapted, the same in every adapter as PEFT demands.

    Raises ``target_parameters_mismatch``.
    """
    stated = [tuple(sorted(set((a.config and a.config.target_parameters) or ()))) for a in adapters]
    for adapter, own in zip(adapters, stated, strict=True):
        if own != stated[0]:
            raise InputError(
                "target_parameters_mismatch",
                f"{adapters[0].label} and {adapter.label} differ in target_parameters: "
                f"{', '.join(stated[0][:10]) or 'none'} and {', '.join(own[:10]) or 'none'}",
                remedy="Merge only adapters with the same target_parameters",
                where={"model": adapter.label, "field": "target_parameters"},
            )
    return stated[0]


def _check_spellings(adapters: Sequence[Adapter]) -> None:
    """One denoiser must not appear under the names of two codebases, or nothing would be merged."""
    found: dict[bool, tuple[Adapter, str]] = {}
    for adapter in adapters:
        for name in adapter.modules:
            component = name.partition(".")[0]
            if not component.startswith("text_encoder"):
                found.setdefault(component in ORIGINAL, (adapter, component))
    if len(found) > 1:
        shown = ", ".join(f"{adapter.label} uses {component}." for adapter, component in found.values())
        raise InputError(
            "mixed_spellings",
            f"the adapters name the layers of the model in two ways: {shown}",
            remedy="Convert them to one naming first",
            where={"model": list(found.values())[1][0].label, "field": "models"},
        )
