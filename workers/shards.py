"""The jobs of a merge that was split: make one file of the output, and complete the result.

They work for the attempt that split the merge, and stop when it is no longer the current one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import MergeFailure
from merging.recipe import Recipe
from service.broker import shards_key, text
from service.clock import millis
from service.documents import FileEntry, MergeRecord, MergeResult, result_key
from service.logs import request_id
from service.outlines import outline
from service.scratch import scratch
from workers.attempt import Attempt
from workers.lead import SETTLED, Resolve, note, part_key, parts_name, planned, threads_for
from workers.workplace import Workplace

if TYPE_CHECKING:
    from merging.dense.plan import DensePlan, ShardPlan
    from merging.dense.runner import Settled, ShardResult

_SHARDS_SHARE = 0.95
_log = logging.getLogger("merganser.shards")


def run_shard(tenant: str, merge_id: str, attempt: str, name: str, index: int) -> None:
    """Make one file of a merge and keep it."""
    _run(tenant, merge_id, attempt, lambda part, folder: part.make(folder, name, index))


def run_finish(tenant: str, merge_id: str, attempt: str, name: str, count: int) -> None:
    """Publish the result of a merge whose files are made, or say that some could not be."""
    _run(tenant, merge_id, attempt, lambda part, folder: part.finish(folder, name, count))


def _run(tenant: str, merge_id: str, attempt: str, work: Callable[[Part, Path], None]) -> None:
    place = Workplace.open()
    part = Part(tenant, merge_id, attempt, place)
    with scratch(place.settings.scratch_dir) as folder:
        part.guarded(lambda: work(part, folder), folder)


class Part(Attempt):
    """What one job of a split merge does."""

    def __init__(self, tenant: str, merge_id: str, attempt: str, place: Workplace) -> None:
        super().__init__(tenant, merge_id, attempt, place.jobs, place.storage, place.pushes, place.room)
        self._place = place
        self._key = shards_key(tenant, merge_id)

    def make(self, folder: Path, name: str, index: int) -> None:
        """Make the shard ``index``, unless it is there."""
        record = self._begin()
        if self._storage.size(part_key(record, name, note(index))) is not None:
            self._move(index, 1.0)
            return
        recipe = Recipe.load(record.recipe)
        find = self._place.sources.place(self._tenant, recipe, folder / "inputs", outlines=True)
        with self._planned(recipe, find) as plan:
            _demand(plan, name)
            needed = _files(plan, plan.shards[index])
        for reference, path in needed:
            self._place.sources.fetch(self._tenant, reference, path, find(reference))
        out = folder / "out"
        out.mkdir()
        with self._planned(recipe, find) as plan:
            made = self._merged(plan, record, self._settled(record, name), index, out)
        self.reserve(made.nbytes)  # renews what was reserved for all files
        self._storage.put_file(part_key(record, name, made.file), out / made.file)
        self._storage.put_json(part_key(record, name, note(index)), made.to_dict())
        self._move(index, 1.0)

    def finish(self, folder: Path, name: str, count: int) -> None:
        """Complete the result and publish it."""
        from merging.dense.finish import finalise

        record = self._begin()
        parts = self._parts(record, name, count)
        recipe = Recipe.load(record.recipe)
        find = self._place.sources.place(self._tenant, recipe, folder / "inputs", outlines=True)
        out = folder / "out"
        out.mkdir()
        with self._planned(recipe, find) as plan:
            _demand(plan, name)
            stored = plan.recipe.output.format != "lora"  # the files of an adapter's shards are put together
            for part in parts:
                key = part_key(record, name, part.file)
                if stored:
                    outline(self._storage, key, part.nbytes, out / part.file)
                else:
                    self._storage.fetch(key, out / part.file)
            report, files = finalise(plan, parts, out, settled=self._settled(record, name))
            digest = plan.digest
        moved = {part.file for part in parts} if stored else set()
        entries = []
        for path, sha256 in sorted(files.items()):
            self.advance("store", _SHARDS_SHARE, "storing the result")
            key = result_key(self._tenant, self._id, self._attempt, path)
            if path in moved:
                self._storage.copy(part_key(record, name, path), key)
            else:
                self._storage.put_file(key, out / path)
            entries.append(FileEntry(path=path, sha256=sha256, size=(out / path).stat().st_size))
        self.publish(
            MergeResult(
                attempt=self._attempt,
                recipe_digest=digest,
                seconds=_seconds_since(record.started_at),
                files=tuple(entries),
                summary=report.get("summary", {}),
            )
        )
        self._place.redis.delete(self._key)

    def _begin(self) -> MergeRecord:
        record = self._jobs.get(self._tenant, self._id)
        request_id.set(record.request_id)
        self.advance("merge", self._progress(), "making the files")
        return record

    def _planned(self, recipe: Recipe, find: Resolve) -> Any:
        return planned(self._tenant, recipe, self._place.sources, find, self._place.settings.shard_bytes)

    def _settled(self, record: MergeRecord, name: str) -> Settled:
        from merging.dense.runner import Settled

        found = self._storage.get_json(part_key(record, name, SETTLED))
        if found is None:
            raise MergeFailure("content_missing", "what was settled for this merge is gone from the storage")
        return Settled(float(found["lambda"]), tuple(float(scale) for scale in found["scales"]))

    def _merged(
        self, plan: DensePlan, record: MergeRecord, settled: Settled, index: int, out: Path
    ) -> ShardResult:
        from merging.dense.runner import DenseRunner
        from merging.execute import single_threaded

        shard = plan.shards[index]
        done = 0

        def tick(phase: str) -> None:
            nonlocal done
            done += 1
            self._move(index, done / (len(shard.jobs) + 1))
            self.tick(phase, self._progress(), f"file {index + 1} of {len(plan.shards)}")

        with single_threaded():
            runner = DenseRunner(plan, threads=threads_for(record), tick=tick)
            return runner.merge_shard(shard, out, settled)

    def _parts(self, record: MergeRecord, name: str, count: int) -> list[ShardResult]:
        from merging.dense.runner import ShardResult

        notes = [self._storage.get_json(part_key(record, name, note(index))) for index in range(count)]
        missing = [index for index, found in enumerate(notes) if found is None]
        if missing:
            raise MergeFailure(
                "worker_lost",
                f"{len(missing)} of the {count} files of this merge could not be made",
                remedy="The merge may need more memory or disk than the workers have; see their log",
            )
        return [ShardResult.of(found) for found in notes if found is not None]

    # progress of all

    def _move(self, index: int, fraction: float) -> None:
        self._place.redis.hset(self._key, str(index), f"{fraction:.4f}")

    def _progress(self) -> float:
        fractions = [float(text(value)) for value in self._place.redis.hvals(self._key)]
        return _SHARDS_SHARE * sum(fractions) / max(1, len(fractions))


def _files(plan: DensePlan, shard: ShardPlan) -> list[tuple[str, str]]:
    """The weight files that a shard reads: reference of the model and path, each once."""
    from merging.formats.tensor_set import TensorSet

    found: dict[tuple[str, str], None] = {}
    for job in shard.jobs:
        for entry in job.inputs:
            model = plan.models[entry.model]
            if isinstance(model, TensorSet):
                found[model.label, model.file_of(entry.key)] = None
        if job.in_base and plan.base is not None:
            found[plan.base.label, plan.base.file_of(job.name)] = None
    return list(found)


def _demand(plan: DensePlan, name: str) -> None:
    """Refuse to mix what different versions of the software make."""
    if parts_name(plan) != name:
        raise MergeFailure(
            "worker_versions_differ",
            "the workers of this merge run different versions of the software",
            remedy="Bring all workers to one version and submit the merge again",
        )


def _seconds_since(moment: str | None) -> float:
    return 0.0 if moment is None else round(time.time() - millis(moment) / 1000, 3)
