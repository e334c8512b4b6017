"""The contract between the engine and the methods' code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from merging.catalog.spec import MethodParams
from merging.lowrank import ThinSVD
from merging.updates import Coordinates, LowRank, UpdateStack

GIB = 1 << 30


class Tasks(Protocol):
    """Anything that knows which models it holds."""

    @property
    def tasks(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Context:
    """What a kernel knows beyond the tensors.

    ``params`` are the global parameters, ``per_model[i]`` those of model ``i``, ``digests[i]`` its content.
    ``rank`` is the output rank the recipe asks for, if it does. ``budget`` bounds the working memory in
    bytes. ``warn(code, message)`` reaches the report. ``shared`` is what the survey passes found. ``data`` is
    what methods that look at data see (:class:`merging.calibration.plane.Calibration`).
    """

    params: MethodParams
    per_model: tuple[MethodParams, ...]
    digests: tuple[str, ...]
    space: str | None = None
    seed: int = 0
    rank: int | None = None
    budget: int = GIB // 2
    warn: Callable[[str, str], None] = field(default=lambda code, message: None)
    shared: Any = None
    data: Any = None

    def of(self, stack: Tasks) -> tuple[MethodParams, ...]:
        """The parameters of the tasks that are present in ``stack``."""
        return tuple(self.per_model[task] for task in stack.tasks)

    def weights(self, stack: Tasks) -> Tensor:
        """The weights of the tasks present in ``stack``, ``(T,)`` in float64."""
        return torch.tensor([params.weight for params in self.of(stack)], dtype=torch.float64)


@dataclass(frozen=True)
class Merged:
    """The merged update of a batch: as factors, or as an SVD where the method has one anyway.

    ``discarded (G,)`` is the squared Frobenius norm that a kernel threw away to meet ``ctx.rank``. ``weights
    (T,)`` says that the update is exactly the sum of the tasks of the stack times them.
    """

    update: LowRank | ThinSVD
    discarded: Tensor | None = None
    weights: Tensor | None = None


class Kernel(Protocol):
    """A merge method. ``merge`` maps a stack to its merged update and knows no files.

    A method with statistics over the whole model (a global threshold) asks for ``surveys`` passes: pass
    ``i`` maps every stack to a partial result, ``reduce`` combines them into the next ``ctx.shared``.
    """

    def surveys(self, ctx: Context) -> int: ...

    def survey(self, index: int, stack: UpdateStack, ctx: Context) -> Any: ...

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any: ...

    def merge(self, stack: UpdateStack, ctx: Context) -> Merged: ...


@dataclass(frozen=True)
class Local:
    """A kernel from a function: methods that need nothing beyond the module at hand."""

    function: Callable[[UpdateStack, Context], Merged]

    def surveys(self, ctx: Context) -> int:
        return 0

    def survey(self, index: int, stack: UpdateStack, ctx: Context) -> Any:
        raise RuntimeError("this method takes no surveys")

    def reduce(self, index: int, partials: Sequence[Any], ctx: Context) -> Any:
        raise RuntimeError("this method takes no surveys")

    def merge(self, stack: UpdateStack, ctx: Context) -> Merged:
        return self.function(stack, ctx)


@dataclass(frozen=True)
class MultiMerged:
    """What a multi-output method makes of a batch: one update per task of the stack, in its order.

    ``artefact`` holds what the method keeps beside the adapters, by name, each tensor batched on ``G``
    (empty for most methods). ``facts`` are numbers for the report: ``(G,)``, or ``(G, T)`` per task.
    """

    updates: tuple[LowRank, ...]
    artefact: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Tensor] = field(default_factory=dict)


class MultiKernel(Protocol):
    """A method that writes one adapter per task (``contract.multi_output``)."""

    def split(self, stack: UpdateStack, ctx: Context) -> MultiMerged: ...


@dataclass(frozen=True)
class LocalSplit:
    """A multi-output kernel from a function."""

    function: Callable[[UpdateStack, Context], MultiMerged]

    def split(self, stack: UpdateStack, ctx: Context) -> MultiMerged:
        return self.function(stack, ctx)


def module_chunks(stack: UpdateStack, bytes_per_module: int, budget: int) -> list[UpdateStack]:
    """The stack cut along ``G`` so that the working memory of a piece fits into ``budget`` bytes."""
    step = max(1, budget // max(1, bytes_per_module))
    return [
        UpdateStack(
            stack.names[start : start + step],
            stack.tasks,
            tuple(B[start : start + step] for B in stack.B),
            tuple(A[start : start + step] for A in stack.A),
        )
        for start in range(0, stack.G, step)
    ]


CACHE_BYTES = 1 << 22
"""Size of a block of entries that stays in the cache of a CPU core through several passes."""


def row_blocks(coordinates: Coordinates, budget: int) -> list[tuple[int, int]]:
    """Row ranges such that about six copies of a block of all tasks fit into ``budget`` bytes.

    On a CPU a block also fits into the cache. A matrix product depends in its last bits on the size of the
    block, so whoever compares entries with a threshold takes both from the same blocks.
    """
    per_row = coordinates.G * coordinates.T * coordinates.n * coordinates.like.element_size()
    size = budget // 6
    if coordinates.like.device.type == "cpu":
        size = min(size, CACHE_BYTES)
    step = max(1, min(coordinates.m, size // max(1, per_row)))
    return [(start, min(start + step, coordinates.m)) for start in range(0, coordinates.m, step)]


def entry_blocks(coordinates: Coordinates, budget: int) -> Iterator[tuple[Tensor, int]]:
    """The entries of all tasks in row blocks ``(G, T, rows, n)``, each with its first row.

    All blocks share one buffer, which may be overwritten: use each before asking for the next.
    """
    buffer: Tensor | None = None
    for start, stop in row_blocks(coordinates, budget):
        if buffer is not None and buffer.shape[-2] != stop - start:
            buffer = None
        buffer = coordinates.rows(start, stop, buffer)
        yield buffer, start
