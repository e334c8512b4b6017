"""LoRA on bare parameters of mixture-of-experts layers (PEFT's ``target_parameters``).

One stored pair adapts a parameter (E, d1, d2) with rank r per expert: A is (E * r, in) with the experts as
the slowest index, B is (out, r * E) with the experts as the fastest (peft 0.21.2, ``ParamWrapper``), so that
``delta[e] = scale * B.reshape(out, r, E)[:, :, e] @ A.reshape(E, r, in)[e]``. Whether the base stores the
transpose does not matter between adapters. Here each expert is a module of its own.

Several parameters of one layer are nested: the innermost ``layer.base_layer...`` is the first that the model
defines. The file does not say which is which, so ranks and alphas must be the same for all of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from merging.formats.peft_out import ResultModule

MAX_EXPERTS = 100_000
"""Experts of all layers of one adapter; the largest open models have about half of this."""

_WRAPPED = ".base_layer"


@dataclass(frozen=True, slots=True)
class Expert:
    """Which expert of which stored pair a module is; ``owner`` is the pair's name in the file."""

    owner: str
    index: int
    count: int

    @property
    def layer(self) -> str:
        """The path of the layer that holds the parameter."""
        return layer_of(self.owner)

    @property
    def name(self) -> str:
        """The module's name; names sort as the experts do."""
        return f"{self.owner}[{self.index:0{len(str(self.count - 1))}d}]"


def layer_of(name: str) -> str:
    """The layer's own path, without the wrappers of other parameters."""
    while name.endswith(_WRAPPED):
        name = name.removesuffix(_WRAPPED)
    return name


def depth(name: str) -> int:
    """How many other parameters of the layer are wrapped outside this one."""
    return (len(name) - len(layer_of(name))) // len(_WRAPPED)


def parameters_of(layer: str, targets: Iterable[str]) -> list[str]:
    """The full names of the parameters of a layer that ``target_parameters`` may mean, sorted."""
    found = set()
    for target in targets:
        module, _, parameter = target.rpartition(".")
        if module and (layer == module or layer.endswith(f".{module}")):
            found.add(f"{layer}.{parameter}")
    return sorted(found)


def slice_factors(expert: Expert, B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's B (out, r) and A (r, in) of the stored pair."""
    rank = A.shape[0] // expert.count
    return B[:, expert.index :: expert.count], A[expert.index * rank : (expert.index + 1) * rank]


def join_factors(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored pair of all experts in order; each B (out, k) and A (k, in) is padded to ``rank``."""
    m, n, count = parts[0][0].shape[0], parts[0][1].shape[1], len(parts)
    B, A = parts[0][0].new_zeros(m, rank, count), parts[0][1].new_zeros(count, rank, n)
    for index, (own_B, own_A) in enumerate(parts):
        B[:, : own_B.shape[1], index] = own_B
        A[index, : own_A.shape[0]] = own_A
    return B.reshape(m, rank * count), A.reshape(count * rank, n)


def stored_pairs(modules: Iterable[ResultModule]) -> Mapping[ResultModule, tuple[ResultModule, ...]]:
    """Each pair to be stored and the modules that it holds: itself, or the experts in their order."""
    groups: dict[str, list[ResultModule]] = {}
    for module in modules:
        key = module.name if module.expert is None else f"\0{module.expert.owner}"
        groups.setdefault(key, []).append(module)
    pairs: dict[ResultModule, tuple[ResultModule, ...]] = {}
    for group in groups.values():
        first = group[0]
        if first.expert is None:
            pairs[first] = (first,)
            continue
        parts = sorted(group, key=lambda module: module.expert.index if module.expert else 0)
        rank = first.rank * first.expert.count
        pairs[replace(first, name=first.expert.owner, rank=rank, expert=None)] = tuple(parts)
    return pairs
