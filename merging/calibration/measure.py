"""Compute statistics of activations for the models of a prepared merge, and write them to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from merging.calibration.base import Base
from merging.calibration.samples import Samples, draw, encode, load_tokenizer
from merging.calibration.statistics import Watch, batches, collect, look
from merging.calibration.statistics_file import (
    METADATA_KEY,
    StatisticsFile,
    StatisticsInfo,
    StatisticsModule,
)
from merging.formats.adapter import Adapter
from merging.formats.writer import write_safetensors
from merging.naming import task_names
from merging.preparing import Prepared

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One task that is to be measured."""

    task: int
    name: str
    samples: Samples
    watch: Watch


def missing(prepared: Prepared) -> list[int]:
    """The tasks that bring samples instead of statistics."""
    assert prepared.inputs is not None
    return [task for task, file in enumerate(prepared.inputs.statistics) if file is None]


def ticks(prepared: Prepared) -> int:
    """How often :func:`measure` calls ``tick``."""
    assert prepared.inputs is not None
    inputs = prepared.inputs
    size = inputs.settings.batch_size
    return sum(len(batches(inputs.samples(task), size)) for task in missing(prepared))


def measure(prepared: Prepared, folder: Path, device: torch.device, tick: Tick) -> dict[int, Path]:
    """Write ``<task>.safetensors`` for every task without statistics; task -> file.

    All tasks are checked on one batch first. Raises what :mod:`samples` and :mod:`statistics` raise.
    """
    inputs = prepared.inputs
    tasks = missing(prepared)
    if not tasks:
        return {}
    assert inputs is not None
    assert inputs.base is not None
    modules = {name: prepared.module(name) for name in prepared.table.modules}
    base = Base(inputs.base, {name: (module.m, module.n) for name, module in modules.items()}, device)
    tokenizer = None if inputs.tokenizer is None else load_tokenizer(inputs.tokenizer, base)
    labels = task_names(prepared.labels)
    jobs = []
    for task in tasks:
        dataset = inputs.datasets[task]
        assert dataset is not None
        chosen = draw(dataset, inputs.samples(task), prepared.recipe.seed)
        label = prepared.labels[task]
        samples = encode(label, dataset, chosen, tokenizer, base, inputs.settings.max_length)
        jobs.append(Job(task, labels[task], samples, Watch(label, inputs.settings)))
    for job in jobs:
        with _model(prepared, base, job.task) as replaced:
            look(base, job.samples, job.watch, replaced)
    written = {}
    sizes = {name: module.n for name, module in modules.items()}
    for job in jobs:
        with _model(prepared, base, job.task) as replaced:
            for _done in collect(base, job.samples, job.watch, replaced, sizes):
                tick(f"statistics of {job.name}")
        written[job.task] = _write(prepared, job, folder)
        job.watch.sums.clear()
    return written


def opened(paths: Mapping[int, Path], prepared: Prepared) -> tuple[StatisticsFile, ...]:
    """The statistics of all tasks: the recipe's own, and those of ``paths``."""
    assert prepared.inputs is not None
    given = prepared.inputs.statistics
    return tuple(file or StatisticsFile(paths[task]) for task, file in enumerate(given))


@contextmanager
def _model(prepared: Prepared, base: Base, task: int) -> Iterator[dict[str, Tensor]]:
    """The model whose inputs are measured: the base, or the fine-tuned one."""
    assert prepared.inputs is not None
    if prepared.inputs.features == "base":
        yield {}
        return
    adapter = prepared.adapters[task]
    factors = {
        name: adapter.factors(name, dtype=torch.float32, device=base.device) for name in adapter.modules
    }

    def add(name: str, x: Tensor, y: Tensor) -> Tensor:
        B, A = factors[name]
        return y + (x @ A.mT) @ B.mT

    with base.hooked(add, [name for name in base.layers if name in factors]):
        yield _full(adapter, base)


def _full(adapter: Adapter, base: Base) -> dict[str, Tensor]:
    """The fully trained parameters of an adapter that the base model has too."""
    found = {}
    for name in adapter.full_tensors:
        own = base.own_name(name)
        if own is not None:
            found[own] = adapter.full_tensor(name).float().to(base.device)
    return found


def _write(prepared: Prepared, job: Job, folder: Path) -> Path:
    inputs = prepared.inputs
    assert inputs is not None
    assert inputs.base is not None
    dataset = inputs.datasets[job.task]
    assert dataset is not None
    settings = inputs.settings
    modules = {
        name: StatisticsModule(m=prepared.module(name).m, n=prepared.module(name).n, source=source)
        for name, source in sorted(job.watch.shared.items())
    }
    some = next(iter(job.watch.sums.values()))
    info = StatisticsInfo(
        base=inputs.base.digest,
        base_model=prepared.recipe.base_model,
        features=inputs.features,
        model=prepared.adapters[job.task].digest if inputs.features == "model" else None,
        data=dataset.digest,
        samples=len(job.samples),
        rows=some.count,
        row=settings.rows,
        statistic=settings.statistic,
        sketch_rows=settings.sketch_rows if settings.statistic == "sketch" else None,
        modules=modules,
    )
    specs = info.specs()

    def tensors() -> Iterator[Tensor]:
        for spec in specs:
            source, _, kind = spec.name.rpartition(".")
            total = job.watch.sums[source]
            yield total.mean() if kind == "mean" else total.matrix()

    path = folder / f"{job.name}.safetensors"
    write_safetensors(path, specs, tensors(), {"format": "pt", METADATA_KEY: info.model_dump_json()})
    return path
