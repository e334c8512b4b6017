"""What the quality table measures: every method with its defaults, and some with other settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

SUMS = (1.0, 1.2, 1.4)
ELECTIONS = (1.4, 1.7, 2.0, 2.4)
ISOTROPIC = (1.7, 2.0, 2.4)
OWN_RULE = (0.8, 1.2, 1.7)

SCANS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("linear", "svd", "magnitude_prune", "dare_linear", "della_linear", "breadcrumbs"), SUMS),
    **dict.fromkeys(("cart", "consensus"), (*SUMS, 1.7)),
    **dict.fromkeys(("iso_c", "iso_cts"), ISOTROPIC),
    **dict.fromkeys(("lora_lego", "lore"), OWN_RULE),
}
"""Norms of the merged update to try, in units of the mean norm of the adapters."""

PRESETS = ("core_space", "knots")
"""Names for a method in a fixed space; they are listed under the method."""

TWO_MODELS = ("slerp",)


@dataclass(frozen=True)
class Variant:
    """A recipe without its models. ``scan`` says that other scales than the default are tried too."""

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    space: str | None = None
    output: dict[str, Any] = field(default_factory=dict)
    scan: bool = True

    def recipe(self) -> dict[str, Any]:
        """The recipe; results in float32, so that the format adds no error of its own."""
        return {
            "merge_method": self.method,
            "space": self.space,
            "parameters": self.parameters,
            "output": {"dtype": "float32", **self.output},
        }

    @property
    def multiples(self) -> tuple[float, ...]:
        """Norms to try on the validation split."""
        return SCANS.get(self.method, ELECTIONS) if self.scan else ()

    def without_scan(self) -> Variant:
        """The same with its default scale only."""
        return replace(self, scan=False)


def variants() -> Iterator[Variant]:
    """All methods that need no data with their defaults, then other spaces and settings."""
    from merging import catalog

    methods = [
        name
        for name in catalog.names()
        if name not in PRESETS + TWO_MODELS and not catalog.get(name).contract.data
    ]
    for method in methods:
        yield Variant(method, method)
    for method in ("linear", "svd"):
        yield Variant(f"{method}, lambda auto", method, {"lambda": "auto"}, scan=False)
    for method in ("ties", "dare_ties"):
        for space in ("knots", "core"):
            yield Variant(f"{method}, {space}", method, space=space)
    yield from _settings(set(methods))


def _settings(methods: set[str]) -> Iterator[Variant]:
    yield Variant("ties, density 0.5", "ties", {"density": 0.5})
    for space in ("knots", "core"):
        yield Variant(f"ties, {space}, density 0.5", "ties", {"density": 0.5}, space)
    yield Variant("ties, core, gauge asis", "ties", {"core_gauge": "asis"}, "core")
    yield Variant("ties, core, isotropize", "ties", {"isotropize": True}, "core")
    yield Variant("ties, rank 16", "ties", output={"rank": 16})
    yield Variant("tsv, rank 16", "tsv", output={"rank": 16})
    yield Variant("tsv, isotropize", "tsv", {"isotropize": True})
    for method in ("breadcrumbs", "della", "sce", "consensus"):
        if method in methods:
            yield Variant(f"{method}, core", method, space="core")
