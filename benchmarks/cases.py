"""What the speed table measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TIES = ("ties", "dare_ties", "magnitude_prune", "breadcrumbs", "della", "sce", "consensus")
SPECTRAL = ("tsv", "iso_c", "iso_cts", "cart")
NAMED = ("drm_h", "drm_v", "lora_lego", "lore", "rmm")


@dataclass(frozen=True)
class Case:
    """One measured merge. ``floor`` names the case that it is compared with; ``limit`` is the promised ratio.

    ``process`` cases are whole commands, imports included. ``once`` cases take long and run once.
    """

    name: str
    tool: str
    set: str = "big"
    floor: str | None = "floor: rank space"
    limit: float | None = None
    process: bool = False
    once: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def ours(name: str, method: str, *, limit: float | None = None, **rest: Any) -> Case:
    """A merge by this library; ``rest`` holds recipe keys beside ``set``, ``threads`` and case fields."""
    fields = {key: rest.pop(key) for key in ("set", "floor", "once") if key in rest}
    options = {key: rest.pop(key) for key in ("threads",) if key in rest}
    recipe = {"merge_method": method, **rest}
    return Case(name, "ours", limit=limit, options={"recipe": recipe, **options}, **fields)


def peft(combination: str, set_: str, **rest: Any) -> Case:
    """``add_weighted_adapter``; only its own work counts, not the loading."""
    options = {"combination": combination, "options": rest}
    return Case(f"PEFT {combination}", "peft", set_, None, options=options)


def table(methods: set[str], *, quick: bool) -> Iterator[Case]:
    """The default table: rank-space methods on the big set, PEFT on what it can do in reasonable time."""
    yield Case("floor: rank space", "floor", floor=None, options={"what": "rank_space"})
    yield Case("floor: read and write", "floor", floor=None, options={"what": "read_write"})
    yield ours("svd", "svd", limit=1.5)
    yield ours("linear (exact)", "linear")
    for space in ("core", "knots"):
        yield ours(f"ties, {space}", "ties", space=space, limit=6)
        yield ours(f"ties, {space}, rank 16", "ties", space=space, output={"rank": 16}, limit=6)
    for method in [name for name in TIES[1:] if name in methods][: 1 if quick else None]:
        yield ours(f"{method}, core", method, space="core")
    for method in SPECTRAL + NAMED:
        if method in methods:
            yield ours(method, method, limit=15 if method in ("lora_lego", "lore", "rmm") else 6)
    yield Case("`merganser merge`, svd", "command", process=True, options={"recipe": {"merge_method": "svd"}})
    yield peft("cat", "big")
    yield peft("ties", "big", density=0.2)
    yield Case("floor: rank space", "floor", "small", None, options={"what": "rank_space"})
    yield ours("svd", "svd", set="small")
    yield ours("ties, core", "ties", space="core", set="small")
    yield peft("cat", "small")
    if not quick:
        yield peft("svd", "small")
        yield peft("ties_svd", "small", density=0.2)


ONE_OF_EACH = {"self_attn.q_proj": 2, "self_attn.k_proj": 2, "mlp.gate_proj": 3}
"""A layer of each shape, and how often the shape occurs per layer; ``down_proj`` counts as its transpose."""


def peft_svd_parts() -> Iterator[Case]:
    """Single layers of the big set through PEFT's svd; together they stand for the whole set."""
    for name in ONE_OF_EACH:
        options = {"combination": "svd", "options": {}, "only": f"model.layers.0.{name}"}
        yield Case(f"PEFT svd, one {name.partition('.')[2]}", "peft", "big", None, once=True, options=options)


def core_space_reference(checkout: str) -> Iterator[Case]:
    """The Core Space authors' own code: as it is on the small set, without its rank print on both."""
    for set_, rank_print in (("small", True), ("small", False), ("big", False)):
        for name, config in (
            ("sum", {"merge_method": "sum"}),
            ("ties", {"merge_method": "ties", "topK": 20}),
            ("tsv, isotropize", {"merge_method": "tsv", "isotropize": True}),
        ):
            if rank_print and name != "sum":
                continue
            what = "as it is" if rank_print else "no rank print"
            options = {"checkout": checkout, "rank_print": rank_print, "config": config}
            yield Case(
                f"Core Space reference, {name} ({what})", "reference", set_, once=True, options=options
            )


def full_space() -> Iterator[Case]:
    """TIES in full space, with an adapter of rank 16 as output."""
    yield Case("floor: full space", "floor", floor=None, once=True, options={"what": "full_space"})
    yield ours(
        "ties, full, rank 16",
        "ties",
        space="full",
        output={"rank": 16},
        floor="floor: full space",
        limit=1.3,
        once=True,
    )


def whole_model() -> Iterator[Case]:
    """The adapters of an 8B model, with two threads: how much more than reading and writing is it?"""
    yield Case("floor: read and write", "floor", "8b", None, options={"what": "read_write"})
    yield Case("floor: rank space", "floor", "8b", "floor: read and write", options={"what": "rank_space"})
    for threads in (1, 2):
        yield ours(
            f"ties, core, rank 16, {threads} threads",
            "ties",
            space="core",
            output={"rank": 16},
            set="8b",
            threads=threads,
            floor="floor: read and write",
        )
