"""A dense merge from recipe to result directory, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merging.dense.finish import finalise
from merging.dense.inputs import Resolve
from merging.dense.plan import Origin, prepare_dense
from merging.dense.resume import Attempt, attempt_key
from merging.dense.runner import DenseRunner, thread_limit
from merging.execute import single_threaded
from merging.formats.result_dir import ResultDirectory
from merging.recipe import Recipe

Say = Callable[[str, int, int], None]
"""Told the phase, the tensors done and the tensors there are; may raise to stop."""


def merge_dense(
    recipe: Recipe,
    out: Path,
    *,
    resolve: Resolve,
    threads: int,
    say: Say,
    overwrite: bool = False,
    memory_budget: int | None = None,
    shard_bytes: int | None = None,
    sums: Mapping[str, str] | None = None,
    origin: Origin | None = None,
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Merge into the folder ``out``; the digest of the recipe, the report and the sha256 of every file.

    Takes over the finished shards of an interrupted run of the same merge.
    """
    ResultDirectory(out, overwrite).check()
    with (
        prepare_dense(
            recipe, resolve=resolve, shard_bytes=shard_bytes, sums=sums, origin=origin, threads=threads
        ) as plan,
        single_threaded(),
    ):
        done = 0

        def tick(phase: str) -> None:
            nonlocal done
            done += 1
            say(phase, done, total)

        runner = DenseRunner(plan, threads=thread_limit(plan, threads, memory_budget), tick=tick)
        merged = sum(1 for job in plan.jobs if job.inputs)
        total = len(plan.jobs) + (runner.passes - 1) * merged + 1
        with Attempt(out, attempt_key(plan), overwrite) as attempt:
            parts = attempt.finished(len(plan.shards))
            kept = {part.index for part in parts}
            done += sum(len(shard.jobs) for shard in plan.shards if shard.index in kept)
            settled = attempt.settled()
            if settled is None:
                settled = runner.settle()
                attempt.settle(settled)
            else:
                done += (runner.passes - 1) * merged
            for shard in plan.shards:
                if shard.index not in kept:
                    parts.append(runner.merge_shard(shard, attempt.path, settled))
                    attempt.note(parts[-1])
            report, files = finalise(plan, parts, attempt.path, settled=settled, keep_parts=True)
            attempt.surplus = [part.file for part in parts if part.file not in files]
        return plan.digest, report, files
