"""The jobs of a merge that was split: make one file of the output, and complete the result.

They work for the attempt that split the merge, and stop when it is no longer the current one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import MergeFailure
from service.broker import shards_key, text
from service.clock import millis
from service.documents import FileEntry, MergeRecord, MergeResult, result_key
from service.logs import request_id
from service.outlines import outline
from service.scratch import scratch
from service.work import Work, kept
from workers.attempt import Attempt
from workers.lead import SETTLED, note, part_key, parts_name, threads_for
from workers.plans import Files, Resolve, planned
from workers.workplace import Workplace

if TYPE_CHECKING:
    from merging.dense.runner import ShardResult

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
        work = kept(record.recipe)
        find = self._place.sources.place(self._tenant, work, folder / "inputs", outlines=True)
        with self._planned(work, find) as plan:
            _demand(plan, name)
            needed = plan.inputs(index)
        for reference, path in needed:
            self._place.sources.fetch(self._tenant, reference, path, find(reference))
        out = folder / "out"
        out.mkdir()
        with self._planned(work, find) as plan:
            made = self._merged(plan, record, self._settled(record, name), index, out)
        self.reserve(made.nbytes)  # renews what was reserved for all files
        self._storage.put_file(part_key(record, name, made.file), out / made.file)
        self._storage.put_json(part_key(record, name, note(index)), made.to_dict())
        self._move(index, 1.0)

    def finish(self, folder: Path, name: str, count: int) -> None:
        """Complete the result and publish it."""
        record = self._begin()
        parts = self._parts(record, name, count)
        work = kept(record.recipe)
        find = self._place.sources.place(self._tenant, work, folder / "inputs", outlines=True)
        out = folder / "out"
        out.mkdir()
        with self._planned(work, find) as plan:
            _demand(plan, name)
            for part in parts:
                key = part_key(record, name, part.file)
                if plan.final:
                    outline(self._storage, key, part.nbytes, out / part.file)
                else:
                    self._storage.fetch(key, out / part.file)
            report, files = plan.finish(parts, out, self._settled(record, name))
            moved = {part.file for part in parts} if plan.final else set()
            digest = plan.digest
        self.reserve(sum((out / path).stat().st_size for path in files))
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

    def _planned(self, work: Work, find: Resolve) -> AbstractContextManager[Files]:
        return planned(self._tenant, work, self._place.sources, find, self._place.settings.shard_bytes)

    def _settled(self, record: MergeRecord, name: str) -> dict[str, Any]:
        found: dict[str, Any] | None = self._storage.get_json(part_key(record, name, SETTLED))
        if found is None:
            raise MergeFailure("content_missing", "what was settled for this merge is gone from the storage")
        return found

    def _merged(
        self, plan: Files, record: MergeRecord, settled: dict[str, Any], index: int, out: Path
    ) -> ShardResult:
        done = 0

        def tick(phase: str) -> None:
            nonlocal done
            done += 1
            self._move(index, done / (plan.sizes[index] + 1))
            self.tick(phase, self._progress(), f"file {index + 1} of {len(plan.sizes)}")

        return plan.make(index, out, settled, threads_for(record), tick)

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


def _demand(plan: Files, name: str) -> None:
    """Refuse to mix what different versions of the software make."""
    if parts_name(plan) != name:
        raise MergeFailure(
            "worker_versions_differ",
            "the workers of this merge run different versions of the software",
            remedy="Bring all workers to one version and submit the merge again",
        )


def _seconds_since(moment: str | None) -> float:
    return 0.0 if moment is None else round(time.time() - millis(moment) / 1000, 3)
