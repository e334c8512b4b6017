"""Run a prepared merge batch by batch: load factors, call the kernel, compress, measure.

Batches are independent, so a pool of threads works on them while their results are taken in a fixed order.
Every batch is computed with one torch thread, whatever the size of the pool: the same numbers in the same
order of operations, hence the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from merging.compress import RankRule, compress
from merging.diagnostics import SAMPLE, measure
from merging.kernels import Context, Kernel, Merged, MultiKernel
from merging.lowrank import squared_norm
from merging.outcomes import Outcome, Split, outcomes
from merging.preparing import Batch, Prepared
from merging.spaces import balance
from merging.updates import LowRank, UpdateStack

Item = TypeVar("Item")
Result = TypeVar("Result")

CPU_BATCH_NUMBERS = 1 << 21
"""Factor entries per batch on a CPU, where batching saves only call overhead."""

CUDA_BATCH_NUMBERS = 1 << 28


def units(prepared: Prepared, device: torch.device) -> list[Batch]:
    """The batches cut to a size that fits; independent of the number of threads."""
    limit = CPU_BATCH_NUMBERS if device.type == "cpu" else CUDA_BATCH_NUMBERS
    pieces: list[Batch] = []
    for batch in prepared.batches:
        per_module = (batch.m + batch.n) * batch.R
        if prepared.resolved.space == "full":
            per_module = len(batch.tasks) * batch.m * batch.n
        elif prepared.resolved.space == "knots":
            per_module = len(batch.tasks) * batch.R * batch.n
        size = max(1, limit // per_module)
        names = iter(batch.names)
        while chunk := tuple(islice(names, size)):
            pieces.append(replace(batch, names=chunk))
    return pieces


def load_stack(prepared: Prepared, batch: Batch, device: torch.device) -> UpdateStack:
    """Read the factors of a batch; float32, or float64 where an input is stored so."""
    stored = {prepared.adapters[task].modules[name].dtype for task in batch.tasks for name in batch.names}
    dtype = torch.float64 if "F64" in stored else torch.float32
    joined_B = torch.empty(len(batch.names), batch.m, batch.R, dtype=dtype)
    joined_A = torch.empty(len(batch.names), batch.R, batch.n, dtype=dtype)
    start = 0
    for task, rank in zip(batch.tasks, batch.ranks, strict=True):
        for g, name in enumerate(batch.names):
            B, A = prepared.adapters[task].factors(name)
            joined_B[g, :, start : start + rank] = B
            joined_A[g, start : start + rank] = A
        start += rank
    return UpdateStack.of_joined(
        batch.names, batch.tasks, batch.ranks, joined_B.to(device), joined_A.to(device)
    )


@dataclass(frozen=True)
class Runner:
    """A prepared merge with its :class:`Kernel` or :class:`MultiKernel`, ready to run."""

    prepared: Prepared
    kernel: Any
    context: Context
    rule: RankRule
    device: torch.device
    threads: int
    scales: tuple[float, ...] = ()
    sample: int = SAMPLE

    def equalized(self, tick: Callable[[str], None]) -> Runner:
        """The runner that scales each model's whole update to the mean norm, if the recipe says so."""
        if not self.prepared.recipe.prepare.equalize_norms:
            return self
        squares = [0.0] * len(self.prepared.adapters)
        for tasks, found in self._map(self._squares, tick, "norms"):
            for task, square in zip(tasks, found, strict=True):
                squares[task] += square
        norms = [square**0.5 for square in squares]
        mean = sum(norms) / len(norms)
        return replace(self, scales=tuple(mean / norm if norm > 0.0 else 1.0 for norm in norms))

    def surveyed(self, tick: Callable[[str], None]) -> Runner:
        """The runner after the kernel's passes over the whole model, if it takes any."""
        runner = self
        for index in range(self._surveys()):
            partials = list(runner._map(partial(runner._survey, index), tick, "survey"))
            shared = self.kernel.reduce(index, partials, runner.context)
            runner = replace(runner, context=replace(runner.context, shared=shared))
        return runner

    def outcomes(self, tick: Callable[[str], None]) -> Iterator[Outcome]:
        """The merged modules in the order of the batches."""
        for results in self._map(self._merge, tick, "merge"):
            yield from results

    def splits(self, tick: Callable[[str], None]) -> Iterator[Split]:
        """The modules of a multi-output merge in the order of the batches."""
        for results in self._map(self._split, tick, "merge"):
            yield from results

    def passes(self) -> int:
        """How many times each batch is visited."""
        return 1 + int(self.prepared.recipe.prepare.equalize_norms) + self._surveys()

    def _surveys(self) -> int:
        if self.prepared.resolved.method.contract.multi_output:
            return 0
        kernel: Kernel = self.kernel
        return kernel.surveys(self.context)

    def _map(
        self, function: Callable[[Batch], Result], tick: Callable[[str], None], phase: str
    ) -> Iterator[Result]:
        pieces = units(self.prepared, self.device)
        for _batch, result in in_order(function, pieces, self.threads):
            yield result
            tick(phase)

    def _load(self, batch: Batch) -> UpdateStack:
        return load_stack(self.prepared, batch, self.device)

    def _ready(self, stack: UpdateStack) -> UpdateStack:
        """The stack after the recipe's preparatory steps."""
        if self.scales:
            stack = stack.scaled(torch.tensor([self.scales[task] for task in stack.tasks]))
        return balance(stack) if self.prepared.recipe.prepare.balance else stack

    def _squares(self, batch: Batch) -> tuple[tuple[int, ...], list[float]]:
        stack = self._load(batch)
        parts = [LowRank(B, A) for B, A in zip(stack.B, stack.A, strict=True)]
        return batch.tasks, [float(squared_norm(part).sum()) for part in parts]

    def _survey(self, index: int, batch: Batch) -> Any:
        return self.kernel.survey(index, self._ready(self._load(batch)), self.context)

    def _merge(self, batch: Batch) -> list[Outcome]:
        stack = self._load(batch)
        rule = self.rule
        if rule.exact and self.prepared.resolved.method.name == "svd":
            rule = replace(rule, rank=max(batch.ranks))
        context = replace(self.context, rank=rule.ceiling if rule.energy is None else None)
        ready = self._ready(stack)
        merged = self.kernel.merge(ready, context)
        done = compress(merged, rule, seed=context.seed, names=batch.names)
        plain = ready is stack and done.update is merged.update
        return outcomes(
            stack,
            done.update,
            done.ranks,
            done.discarded,
            svd=done.svd,
            weights=merged.weights if plain else None,
            seed=context.seed,
            sample=self.sample,
        )

    def _split(self, batch: Batch) -> list[Split]:
        stack = self._load(batch)
        kernel: MultiKernel = self.kernel
        done = kernel.split(self._ready(stack), self.context)
        columns = []
        for t, update in enumerate(done.updates):
            alone = UpdateStack(stack.names, (stack.tasks[t],), (stack.B[t],), (stack.A[t],))
            cut = compress(Merged(update), self.rule, seed=self.context.seed, names=batch.names)
            columns.append(outcomes(alone, cut.update, cut.ranks, cut.discarded, seed=self.context.seed))
        artefact = {key: tensor.cpu() for key, tensor in done.artefact.items()}
        facts = {key: tensor.double().cpu() for key, tensor in done.facts.items()}
        inputs = measure(stack, None, seed=self.context.seed, sample=self.sample)
        return [
            Split(
                name,
                tuple(column[g] for column in columns),
                {key: tensor[g] for key, tensor in artefact.items()},
                {key: _plain(tensor[g]) for key, tensor in facts.items()},
                inputs[g],
            )
            for g, name in enumerate(stack.names)
        ]


def _plain(value: Tensor) -> float | tuple[float, ...]:
    return float(value) if value.ndim == 0 else tuple(float(x) for x in value)


def in_order(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int
) -> Iterator[tuple[Item, Result]]:
    """Map with ``threads`` threads, yield in order, keep at most ``threads + 1`` results in flight."""
    if threads <= 1:
        for item in items:
            yield item, function(item)
        return

    def task(item: Item) -> Result:
        torch.set_num_threads(1)
        return function(item)

    waiting: deque[tuple[Item, Future[Result]]] = deque()
    remaining = iter(items)
    with ThreadPoolExecutor(threads, thread_name_prefix="merge") as pool:
        try:
            for item in islice(remaining, threads + 1):
                waiting.append((item, pool.submit(task, item)))
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
                for following in islice(remaining, 1):
                    waiting.append((following, pool.submit(task, following)))
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def single_threaded() -> Iterator[None]:
    """One torch thread inside; the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
