"""What the quality table measures: every method with its defaults, and some with other settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SUMS = (0.8, 1.0, 1.2, 1.4, 1.7)
ELECTIONS = (1.2, 1.4, 1.7, 2.0, 2.4)
ISOTROPIC = (1.4, 1.7, 2.0, 2.4)
OWN_RULE = (0.5, 0.8, 1.2, 1.7)

SCANS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("linear", "svd", "magnitude_prune", "dare_linear", "della_linear", "breadcrumbs"), SUMS),
    **dict.fromkeys(("cart", "consensus", "regmean", "adarank"), (*SUMS, 2.0)),
    **dict.fromkeys(("iso_c", "iso_cts"), ISOTROPIC),
    **dict.fromkeys(("lora_lego", "lore"), OWN_RULE),
}
"""Norms of the merged update to try, in units of the mean norm of the adapters."""


@dataclass(frozen=True)
class Variant:
    """A recipe without its models. ``default`` says that it is a method as the catalogue has it."""

    name: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    space: str | None = None
    output: dict[str, Any] = field(default_factory=dict)
    default: bool = False

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
        return SCANS.get(self.method, ELECTIONS)


PRESETS = ("core_space", "knots")
"""Names for a method in a fixed space; they are listed under the method."""

TWO_MODELS = ("slerp",)


def variants(methods: list[str]) -> Iterator[Variant]:
    """All methods with their defaults, then the same in other spaces and with other settings."""
    for method in methods:
        if method not in PRESETS + TWO_MODELS:
            yield Variant(method, method, default=True)
    for space in ("knots", "core"):
        yield Variant(f"ties, {space}", "ties", space=space)
    yield Variant("ties, density 0.5", "ties", {"density": 0.5})
    for space in ("knots", "core"):
        yield Variant(f"ties, {space}, density 0.5", "ties", {"density": 0.5}, space)
    yield Variant("ties, core, gauge asis", "ties", {"core_gauge": "asis"}, "core")
    yield Variant("ties, core, isotropize", "ties", {"isotropize": True}, "core")
    yield Variant("ties, rank 16", "ties", output={"rank": 16})
    for method in ("dare_ties", "della", "breadcrumbs_ties", "sce", "consensus", "magnitude_prune"):
        if method in methods:
            yield Variant(f"{method}, core", method, space="core")
    if "dare_ties" in methods:
        yield Variant("dare_ties, density 0.2", "dare_ties", {"density": 0.2})
    if "drm_h" in methods:
        yield Variant("drm_h, density 0.5", "drm_h", {"density": 0.5})
    if "tsv" in methods:
        yield Variant("tsv, isotropize", "tsv", {"isotropize": True})
    if "lora_lego" in methods:
        yield Variant("lora_lego, k 64", "lora_lego", {"k": 64})
    if "lore" in methods:
        yield Variant("lore, ties", "lore", {"final": "ties"})
