"""What mergekit 0.1.5 can do, as data: its methods, their parameters and what becomes of them here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from merging.errors import InputError

Scope = Literal["shared", "input", "non_base"]
Kind = Literal["number", "truth"]
Sparsify = Literal["magnitude", "random", "band", "ranked_random"]


@dataclass(frozen=True)
class Param:
    """One parameter: of the whole tensor, of every input, or of every input but the base."""

    name: str
    scope: Scope
    kind: Kind = "number"
    default: float | bool | None = None
    required: bool = False


@dataclass(frozen=True)
class MergekitMethod:
    """A method of mergekit by the name it has there; ``ours`` is its name in the catalogue."""

    name: str
    ours: str | None
    params: tuple[Param, ...]
    base: Literal["ignored", "required"]
    min_inputs: int = 1
    max_inputs: int | None = None
    sparsify: Sparsify | None = None
    election: bool = False

    @property
    def seeded(self) -> bool:
        """Does it draw random numbers?"""
        return self.sparsify in ("random", "ranked_random")


def _family(
    name: str,
    sparsify: Sparsify | None,
    *,
    election: bool,
    normalize: bool,
    rescale: bool,
    extra: tuple[Param, ...] = (),
) -> MergekitMethod:
    params = (
        Param("int8_mask", "shared", "truth", False),
        Param("normalize", "shared", "truth", normalize),
        Param("rescale", "shared", "truth", rescale),
        Param("lambda", "shared", "number", 1.0),
        Param("weight", "non_base", required=True),
        Param("density", "non_base", "number", 1.0),
        *extra,
    )
    ours = "linear" if name == "task_arithmetic" else name
    return MergekitMethod(name, ours, params, "required", sparsify=sparsify, election=election)


_GAMMA = (Param("gamma", "non_base", "number", 0.01),)
_EPSILON = (Param("epsilon", "non_base", "number", 0.15),)

_METHODS = (
    MergekitMethod(
        "linear",
        "linear",
        (Param("weight", "input", required=True), Param("normalize", "shared", "truth", True)),
        "ignored",
    ),
    MergekitMethod(
        "slerp", "slerp", (Param("t", "shared", required=True),), "required", min_inputs=2, max_inputs=2
    ),
    MergekitMethod("passthrough", None, (Param("scale", "input"),), "ignored", max_inputs=1),
    MergekitMethod(
        "sce",
        "sce",
        (Param("int8_mask", "shared", "truth", False), Param("select_topk", "shared", "number", 1.0)),
        "required",
    ),
    _family("task_arithmetic", None, election=False, normalize=False, rescale=False),
    _family("ties", "magnitude", election=True, normalize=True, rescale=False),
    _family("dare_linear", "random", election=False, normalize=False, rescale=True),
    _family("dare_ties", "random", election=True, normalize=False, rescale=True),
    _family("breadcrumbs", "band", election=False, normalize=False, rescale=False, extra=_GAMMA),
    _family("breadcrumbs_ties", "band", election=True, normalize=False, rescale=False, extra=_GAMMA),
    _family("della", "ranked_random", election=True, normalize=True, rescale=True, extra=_EPSILON),
    _family("della_linear", "ranked_random", election=False, normalize=False, rescale=True, extra=_EPSILON),
)

METHODS: Mapping[str, MergekitMethod] = MappingProxyType({method.name: method for method in _METHODS})

NOT_HERE: Mapping[str, str] = MappingProxyType(
    {
        "nuslerp": "Use `slerp` for two models.",
        "multislerp": "Use `slerp` for two models, or `linear`.",
        "karcher": "Use `slerp` for two models, or `linear`.",
        "model_stock": "Use `linear` or `task_arithmetic` with weights of your choice.",
        "arcee_fusion": "Use `sce` or `ties`.",
        "nearswap": "Use `linear` with per-layer weights.",
        "ram": "Use `dare_ties` or `ties`.",
        "ramplus_tl": "Use `dare_ties` or `ties`.",
    }
)
"""mergekit's methods that are refused by name, with what comes closest."""

OTHER_PARAMS = frozenset(
    {"filter_wise", "nuslerp_row_wise", "nuslerp_flatten", "eps", "max_iter", "tol"}
    | {"normalize_weights", "epsilon", "r", "alpha", "t", "scale", "embed_slerp", "residual_weight"}
)
"""Parameters that only other methods read. Old configurations carry some along; mergekit ignores them."""


def known(name: str) -> MergekitMethod:
    """Raises ``mergekit_method_unsupported`` or ``mergekit_unknown_method``."""
    if name in METHODS:
        return METHODS[name]
    if name in NOT_HERE:
        raise InputError(
            "mergekit_method_unsupported",
            f"mergekit's method {name!r} is not offered here",
            remedy=NOT_HERE[name],
            where={"field": "merge_method"},
        )
    raise InputError(
        "mergekit_unknown_method",
        f"{name!r} is not a method of mergekit",
        remedy=f"Known here: {', '.join(METHODS)}.",
        where={"field": "merge_method"},
    )


def param_names() -> frozenset[str]:
    """Every parameter some method of mergekit reads."""
    return OTHER_PARAMS | {param.name for method in _METHODS for param in method.params}


@dataclass(frozen=True)
class Values:
    """The parameters of one tensor: shared ones, and those of each input in the order of the inputs."""

    shared: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Mapping[str, Any], ...] = ()
