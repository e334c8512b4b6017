"""The job of a merge: claim it, bring its inputs, run the engine, store the result, publish it.

Runs in the work-horse. A merge of whole models that writes several files is handed on to several jobs.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merging.errors import MergeFailure
from merging.recipe import Recipe
from service.documents import FileEntry, MergeResult, result_key
from service.jobs import Jobs
from service.logs import event, request_id
from service.pushes import Pushes
from service.quota import Reservations
from service.scratch import scratch
from service.sources import Sources
from service.storage import Storage
from service.work import Configuration, Work, kept
from workers.attempt import Attempt
from workers.environment import process_seconds
from workers.lead import Splitter
from workers.progress_file import ProgressFile
from workers.rungs import rungs
from workers.workplace import Workplace

_ENGINE_SHARE = 0.95
Resolve = Callable[[str], Path]
_log = logging.getLogger("merganser.task")


def run_merge(tenant: str, merge_id: str) -> None:
    """Run one attempt of a merge to its end. The attempt is RQ's execution."""
    place = Workplace.open()
    attempt = os.environ["RQ_EXECUTION_ID"]
    splitter = Splitter(place.redis, place.storage, place.settings.shard_bytes)
    parts = (place.jobs, place.storage, place.pushes, splitter, place.room)
    task = Task(tenant, merge_id, attempt, *parts)
    with scratch(place.settings.scratch_dir) as folder:
        task.run(place.sources, folder)


class Task(Attempt):
    """One attempt of one merge, from its claim to its end, or until it is split."""

    def __init__(
        self,
        tenant: str,
        merge_id: str,
        attempt: str,
        jobs: Jobs,
        storage: Storage,
        pushes: Pushes | None = None,
        splitter: Splitter | None = None,
        room: Reservations | None = None,
    ) -> None:
        super().__init__(tenant, merge_id, attempt, jobs, storage, pushes, room)
        self._splitter = splitter
        self._kept: ProgressFile | None = None

    def run(self, sources: Sources, folder: Path) -> None:
        """Claim, merge, publish; what goes wrong for good ends the merge."""
        answer = self._jobs.claim(self._tenant, self._id, self._attempt)
        if answer != "claimed":
            _log.info("%s is not to be run: %s", self._id, answer)
            self.stopped(answer)
            return
        self.guarded(lambda: self._work(sources, folder), folder)
        record = self._jobs.find(self._tenant, self._id)
        if self._kept is not None and (record is None or record.ended):
            self._kept.drop()

    def _work(self, sources: Sources, folder: Path) -> None:
        record = self._jobs.get(self._tenant, self._id)
        request_id.set(record.request_id)
        event(
            *(_log, logging.INFO, f"{self._id} starts"),
            merge=self._id,
            attempt=self._attempt,
            process_seconds=round(process_seconds(), 3),
            engine_loaded="merging.engine" in sys.modules,
        )
        work = kept(record.recipe)
        self.advance("inputs", 0.0, "bringing the inputs")
        folders: dict[str, Path] = {}
        commits: dict[str, str] = {}
        if isinstance(work, Recipe):
            imported = sources.bring(
                self._tenant, work, folder / "imports", lambda message: self.advance("inputs", 0.0, message)
            )
            work, folders, commits = imported.recipe, imported.folders, imported.commits
        find = sources.place(self._tenant, work, folder / "inputs", folders, outlines=True)
        if self._splitter is not None and not folders:
            split = self._splitter.split(self, record, work, sources, find)
            if split:
                return
        sources.complete(self._tenant, work, find)
        self.advance("starting", 0.0, "starting the engine")
        self._kept = ProgressFile(self._storage, self._tenant, self._id, folder / "checkpoint")
        self._kept.bring()
        done = self._run_engine(work, record.memory_bytes, folder / "result", find)
        self.advance("store", _ENGINE_SHARE, "storing the result")
        self.reserve(sum((done.path / path).stat().st_size for path in done.files))
        files = []
        for path, sha256 in sorted(done.files.items()):
            source = done.path / path
            files.append(FileEntry(path=path, sha256=sha256, size=source.stat().st_size))
            self._storage.put_file(result_key(self._tenant, self._id, self._attempt, path), source)
        self.publish(
            MergeResult(
                attempt=self._attempt,
                recipe_digest=done.recipe_digest,
                seconds=round(done.seconds, 3),
                files=tuple(files),
                summary=done.report.get("summary", {}),
                imports=commits,
            )
        )

    def _run_engine(self, work: Work, need: int, out: Path, find: Resolve) -> Any:
        """Run the engine; where memory runs out, leave the merge to a larger worker, or try with less."""
        from merging.engine import merge

        ladder = rungs(need)
        for rung, following in zip(ladder, (*ladder[1:], None), strict=True):
            try:
                return merge(
                    work.document if isinstance(work, Configuration) else work,
                    out,
                    device=rung.device,
                    threads=rung.threads,
                    progress=self._progress,
                    resolve=find,
                    checkpoint=None if self._kept is None else self._kept.path,
                )
            except MergeFailure as error:
                if error.code != "out_of_memory":
                    raise
                self.move_up(f"it ran out of memory on {rung}")
                if following is None:
                    raise
                _log.warning("%s ran out of memory on %s; now on %s", self._id, rung, following)
            gc.collect()
            self.advance("starting", 0.0, f"it ran out of memory on {rung}; now on {following}")
        raise AssertionError("a ladder has rungs")

    def _progress(self, progress: Any) -> None:
        """The engine's callback."""
        fraction = _ENGINE_SHARE * progress.done / max(progress.total, 1)
        if self._kept is not None:
            self._kept.keep()
        self.tick(progress.phase, fraction, progress.message)
