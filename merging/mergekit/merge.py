"""A mergekit configuration from document to result directory, in one process, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merging.dense.resume import Attempt
from merging.execute import single_threaded
from merging.formats.result_dir import ResultDirectory
from merging.mergekit.finish import finish
from merging.mergekit.plan import SHARD_BYTES, MergekitPlan, Resolve, prepare
from merging.mergekit.run import merge_shard
from merging.report import versions

Say = Callable[[str, int, int], None]
"""Told the phase, the tensors done and the tensors there are; may raise to stop."""


def merge_config(
    document: Mapping[str, Any],
    out: Path,
    *,
    name: str = "configuration",
    resolve: Resolve,
    threads: int,
    say: Say,
    overwrite: bool = False,
    shard_bytes: int | None = None,
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Merge into the folder ``out``; the digest, the report and the sha256 of every file.

    Takes over the finished shards of an interrupted run of the same merge.
    """
    ResultDirectory(out, overwrite).check()
    with (
        prepare(document, resolve=resolve, name=name, shard_bytes=shard_bytes or SHARD_BYTES) as plan,
        single_threaded(),
        Attempt(out, attempt_key(plan), overwrite) as attempt,
    ):
        total = len(plan.schedule.outputs) + 1
        parts = attempt.finished(len(plan.shards))
        kept = {part.index for part in parts}
        done = sum(len(shard.outputs) for shard in plan.shards if shard.index in kept)

        def tick(phase: str) -> None:
            nonlocal done
            done += 1
            say(phase, done, total)

        for shard in plan.shards:
            if shard.index not in kept:
                parts.append(merge_shard(plan, shard, attempt.path, threads=threads, tick=tick))
                attempt.note(parts[-1])
        report, files = finish(plan, sorted(parts, key=lambda part: part.index), attempt.path)
        return plan.digest, report, files


def attempt_key(plan: MergekitPlan) -> str:
    """A digest of everything that decides the bytes of the shards."""
    layout = [[shard.file, [output.name for output in shard.outputs]] for shard in plan.shards]
    data = json.dumps(["mergekit", plan.digest, layout, versions()], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()
