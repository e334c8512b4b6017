"""Run a recipe: check it, merge module by module, write the result directory in one atomic step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from merging import catalog, execute
from merging.calibration.plane import calibrated
from merging.compress import RankRule
from merging.dense.fuse import merge_fused
from merging.dense.inputs import wants_dense, wants_fusing
from merging.dense.merge import merge_dense
from merging.errors import Cancelled, InputError, MergeError, MergeFailure
from merging.formats.result_dir import ResultDirectory
from merging.kernels import Context
from merging.mergekit.detect import claimed
from merging.mergekit.merge import merge_config
from merging.parts import write_parts
from merging.preparing import Prepared, Resolve, local_path, prepare
from merging.recipe import Recipe
from merging.report import Findings, build_report
from merging.result import write_result
from merging.spool import Spool


@dataclass(frozen=True)
class Progress:
    """How far a merge is: ``done`` of ``total`` steps."""

    phase: str
    done: int
    total: int
    message: str = ""


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: where it lies and what it is. ``files`` maps names to sha256 digests."""

    path: Path
    recipe_digest: str
    report: dict[str, Any]
    seconds: float
    files: dict[str, str]


def merge(
    recipe: Any,
    out_dir: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: ProgressCallback | None = None,
    resolve: Resolve | None = None,
    overwrite: bool = False,
    checkpoint: Path | None = None,
    memory_budget: int | None = None,
    shard_bytes: int | None = None,
) -> MergeResult:
    """Merge as ``recipe`` says (a :class:`Recipe`, a mapping or a path) and write ``out_dir`` atomically.

    ``device`` is ``auto``, ``cpu`` or ``cuda[:i]``; ``threads`` defaults to the number of cores and
    never changes the result; ``resolve`` maps model references to local folders; ``progress`` may raise
    :class:`Cancelled`. ``checkpoint`` is a file in which a long adaptation to data keeps its state: the
    same merge goes on from it, and ends with the same bytes. Raises :class:`InputError` for bad input
    and :class:`MergeFailure` if the work fails; then nothing is left at ``out_dir``.

    Checkpoints and task vectors are merged tensor by tensor into files of ``shard_bytes`` (default 2 GB) by
    as many threads as fit into ``memory_budget`` bytes. What an interrupted merge of them has finished is
    kept beside ``out_dir``, and the same merge goes on from there. A mergekit configuration is run as it is,
    with mergekit's arithmetic, on the CPU.
    """
    started = time.perf_counter()
    where = pick_device(device)
    steps = _Steps(progress)
    steps.say("prepare")
    out, find = Path(out_dir), resolve or local_path
    whole: dict[str, Any] = {
        "resolve": find,
        "threads": threads or default_threads(),
        "say": steps.set,
        "overwrite": overwrite,
        "shard_bytes": shard_bytes,
    }

    def adapter(inner: Recipe, folder: Path) -> dict[str, Any]:
        options: dict[str, Any] = {"device": device, "threads": threads, "progress": progress}
        return merge(inner, folder, resolve=resolve, checkpoint=checkpoint, **options).report

    config = claimed(recipe, find)
    if config is not None:
        digest, report, files = merge_config(config[0], out, name=config[1], **whole)
        steps.say("publish")
    elif wants_fusing(loaded := Recipe.load(recipe), find):
        digest, report, files = merge_fused(
            loaded, out, merge_adapters=adapter, memory_budget=memory_budget, **whole
        )
    elif wants_dense(loaded, find):
        digest, report, files = merge_dense(loaded, out, memory_budget=memory_budget, **whole)
        steps.say("publish")
    else:
        with (
            ResultDirectory(out, overwrite=overwrite) as result,
            prepare(loaded, resolve=resolve) as prepared,
        ):
            digest, report, files = _adapters(prepared, result.path, where, threads, steps, checkpoint)
            steps.say("publish")
    return MergeResult(out, digest, report, time.perf_counter() - started, files)


def _adapters(
    prepared: Prepared,
    folder: Path,
    device: torch.device,
    threads: int | None,
    steps: _Steps,
    checkpoint: Path | None,
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Merge adapters; the digest of the recipe, the report and the sha256 of every file."""
    try:
        with execute.single_threaded():
            return _run(prepared, folder, device=device, threads=threads, steps=steps, checkpoint=checkpoint)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MergeFailure(
            "out_of_memory",
            f"the merge does not fit into the memory of {device}",
            remedy="Use `device: cpu`, a smaller space, or a larger device.",
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has no type of its own for that on a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def pick_device(name: str) -> torch.device:
    """A torch device from ``auto``, ``cpu`` or ``cuda[:i]``. Raises ``device_unavailable``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise InputError(
            "unknown_device",
            f"unknown device {name!r}",
            remedy="Use auto, cpu, cuda or cuda:<index>.",
            where={"field": "device"},
        )
    if kind == "cuda" and (not torch.cuda.is_available() or int(index or 0) >= torch.cuda.device_count()):
        raise InputError(
            "device_unavailable",
            f"the device {name!r} is not available on this machine",
            remedy="Use `--device cpu` or `--device auto`.",
            where={"field": "device"},
        )
    return torch.device(name)


def default_threads() -> int:
    """One thread per core this process may use, at most eight."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _run(
    prepared: Prepared,
    folder: Path,
    *,
    device: torch.device,
    threads: int | None,
    steps: _Steps,
    checkpoint: Path | None,
) -> tuple[str, dict[str, Any], dict[str, str]]:
    recipe = prepared.recipe
    digests = tuple(adapter.digest for adapter in prepared.adapters)
    method = prepared.resolved.method
    ordered = method.contract.ordered
    named = {} if prepared.inputs is None else prepared.inputs.digests
    digest = recipe.digest({**named, **dict(zip(prepared.labels, digests, strict=True))}, ordered=ordered)
    findings = Findings(prepared)
    context = Context(
        params=prepared.resolved.params,
        per_model=prepared.resolved.per_model,
        digests=digests,
        space=prepared.resolved.space,
        seed=recipe.seed,
        warn=findings.warn,
    )
    runner = execute.Runner(
        prepared,
        catalog.load_kernel(method),
        context,
        RankRule(recipe.output.rank, recipe.output.energy, recipe.output.max_rank),
        device,
        1 if device.type != "cpu" else threads or default_threads(),
    )
    steps.total = runner.passes() * len(execute.units(prepared, device)) + 1
    with Spool(folder) as spool, calibrated(prepared, folder, device, checkpoint) as data:
        if data is not None:
            steps.total += data.ticks
            data.start(steps)
            findings.calibration = data.facts
            runner = replace(runner, context=replace(context, data=data))
        if method.contract.multi_output:
            report, files = write_parts(
                folder, runner.equalized(steps.tick), findings, spool, digest, steps.tick
            )
        else:
            ready = runner.equalized(steps.tick).surveyed(steps.tick)
            for outcome in ready.outcomes(steps.tick):
                spool.put_factors(outcome.name, outcome.B, outcome.A)
                findings.add(outcome)
            findings.settle_lambda()
            findings.calibration = {} if data is None else data.facts
            report = build_report(findings, digest, device.type)
            files = write_result(folder, findings, spool, report)
    steps.tick("write")
    return digest, report, files


class _Steps:
    """Counts steps and tells the callback."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._callback = callback
        self._done = 0
        self.total = 1

    def tick(self, phase: str, message: str = "") -> None:
        self._done += 1
        self.say(phase, message)

    def set(self, phase: str, done: int, total: int) -> None:
        self._done, self.total = done, total
        self.say(phase)

    def say(self, phase: str, message: str = "") -> None:
        if self._callback is not None:
            self._callback(Progress(phase, self._done, self.total, message or phase))


__all__ = [
    "Cancelled",
    "MergeError",
    "MergeResult",
    "Progress",
    "default_threads",
    "merge",
    "pick_device",
]
