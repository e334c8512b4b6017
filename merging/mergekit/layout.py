"""Where the tensors of a model stand: before the layers, in a layer, or after them. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from merging.errors import InputError

EMBEDDINGS = ("embed", "wte", "wpe", "word_embeddings")
TIED = (("lm_head.weight", "model.embed_tokens.weight"), ("lm_head.weight", "transformer.wte.weight"))
"""Output embeddings that may be absent because they are the input embeddings."""


@dataclass(frozen=True)
class Place:
    """``prefix.layer.rest`` of a tensor in a layer; of the others only the side."""

    side: Literal["before", "layer", "after"]
    prefix: str = ""
    layer: int = 0
    rest: str = ""


def place(name: str) -> Place:
    """The place of a tensor by its name: the first whole number between dots is the layer."""
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        if parts[i].isascii() and parts[i].isdigit() and len(parts[i]) <= 6:
            return Place("layer", ".".join(parts[:i]), int(parts[i]), ".".join(parts[i + 1 :]))
    return Place("before" if any(word in name for word in EMBEDDINGS) else "after")


@dataclass(frozen=True)
class Stack:
    """One run of layers: ``layers[i]`` are the rest-names of layer ``i``, sorted."""

    prefix: str
    layers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Layout:
    """The tensors of a model: ``before`` and ``after`` the layers, and its stacks by prefix."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    stacks: Mapping[str, Stack]


def layout(names: Iterable[str], model: str) -> Layout:
    """Raises ``mergekit_layers`` where the layers of a stack are not numbered from 0 on without gaps."""
    outside: dict[str, list[str]] = {"before": [], "after": []}
    found: dict[str, dict[int, list[str]]] = {}
    for name in sorted(names):
        at = place(name)
        if at.side == "layer":
            found.setdefault(at.prefix, {}).setdefault(at.layer, []).append(at.rest)
        else:
            outside[at.side].append(name)
    stacks = {}
    for prefix, layers in sorted(found.items()):
        if sorted(layers) != list(range(len(layers))):
            raise InputError(
                "mergekit_layers",
                f"the layers {prefix}.* of {model} are not numbered 0 to {len(layers) - 1}",
                where={"model": model, "module": prefix},
            )
        stacks[prefix] = Stack(prefix, tuple(tuple(layers[i]) for i in range(len(layers))))
    return Layout(tuple(outside["before"]), tuple(outside["after"]), stacks)


def tied_to(name: str, names: Iterable[str]) -> str | None:
    """The tensor that stands for ``name`` in a model with tied embeddings, if it has one."""
    held = frozenset(names)
    return next((source for target, source in TIED if name == target and source in held), None)
