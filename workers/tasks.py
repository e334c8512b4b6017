"""The job: claim the merge, bring its inputs, run the engine, store the result, publish it.

Runs in the work-horse. An error of the input, or of the merge, ends the merge; what may be different next
time (Redis or the storage away, the process killed) is left to RQ's retry.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rq.timeouts import JobTimeoutException

from merging.errors import Cancelled, MergeError, MergeFailure
from merging.recipe import Recipe
from service.broker import TRANSIENT, connect
from service.documents import FileEntry, MergeResult, attempts_prefix, result_key
from service.errors import Unavailable
from service.inspection import hide_folder
from service.jobs import MAX_RETRIES, Jobs
from service.logs import event, request_id
from service.problems import describe
from service.pushes import Pushes
from service.registry import Registry
from service.remote.references import Hubs
from service.scratch import scratch
from service.settings import load_settings
from service.sources import Sources
from service.storage import Storage
from workers.environment import process_seconds
from workers.rungs import MovedUp, rungs, worker_memory

_REPORT_SECONDS = 0.2
_ENGINE_SHARE = 0.95
Resolve = Callable[[str], Path]
_log = logging.getLogger("merganser.task")


def run_merge(tenant: str, merge_id: str) -> None:
    """Run one attempt of a merge to its end. The attempt is RQ's execution."""
    settings = load_settings()
    connection = connect(settings, patient=True)
    storage = Storage.open(settings.storage_location, patient=True)
    jobs = Jobs(connection, storage)
    registry = Registry(storage, connection, settings.scratch_dir)
    hubs = Hubs.of(settings)
    sources = Sources(registry, jobs, storage, hubs, import_limit=settings.max_upload_bytes)
    pushes = Pushes(connection, jobs)
    task = Task(tenant, merge_id, os.environ["RQ_EXECUTION_ID"], jobs, storage, pushes)
    with scratch(settings.scratch_dir) as folder:
        task.run(sources, folder)


class Task:
    """One attempt of one merge."""

    def __init__(
        self,
        tenant: str,
        merge_id: str,
        attempt: str,
        jobs: Jobs,
        storage: Storage,
        pushes: Pushes | None = None,
    ) -> None:
        self._pushes = pushes
        self._tenant = tenant
        self._id = merge_id
        self._attempt = attempt
        self._jobs = jobs
        self._storage = storage
        self._reported = 0.0
        self._phase = ""

    def run(self, sources: Sources, folder: Path) -> None:
        """Claim, merge, publish; what goes wrong for good ends the merge."""
        answer = self._jobs.claim(self._tenant, self._id, self._attempt)
        if answer != "claimed":
            _log.info("%s is not to be run: %s", self._id, answer)
            self._stopped(answer)
            self._push(answer)  # if an earlier attempt was killed right after it had published
            return
        try:
            self._publish(self._merge(sources, folder))
        except Cancelled:
            self._stopped(self._say("stopping", 0.0, ""))
        except MovedUp:
            raise  # to RQ, which queues the job again, for a larger worker
        except Unavailable as error:
            if self._jobs.get(self._tenant, self._id).attempts <= MAX_RETRIES:
                raise  # tried again
            self._fail(error)
        except MergeError as error:
            self._fail(hide_folder(hide_folder(error, folder / "inputs"), folder))
        except JobTimeoutException:
            self._fail(MergeFailure("timeout", "the merge took longer than a merge may take"))
        except MemoryError:
            self._move_up("it ran out of memory")
            self._fail(MergeFailure("out_of_memory", "the merge does not fit into this worker's memory"))
        except (*TRANSIENT, OSError):
            raise  # tried again
        except Exception:
            _log.exception("unexpected error in %s", self._id)
            self._fail(MergeFailure("internal_error", "an unexpected error happened; it has been logged"))

    def _merge(self, sources: Sources, folder: Path) -> MergeResult:
        record = self._jobs.get(self._tenant, self._id)
        request_id.set(record.request_id)
        event(
            *(_log, logging.INFO, f"{self._id} starts"),
            merge=self._id,
            attempt=self._attempt,
            process_seconds=round(process_seconds(), 3),
            engine_loaded="merging.engine" in sys.modules,
        )
        recipe = Recipe.load(record.recipe)
        self._advance("inputs", 0.0, "bringing the inputs")
        imported = sources.bring(
            recipe, folder / "imports", lambda message: self._advance("inputs", 0.0, message)
        )
        recipe = imported.recipe
        find = sources.place(self._tenant, recipe, folder / "inputs", imported.folders)
        self._advance("starting", 0.0, "starting the engine")
        done = self._run_engine(recipe, record.memory_bytes, folder / "result", find)
        self._advance("store", _ENGINE_SHARE, "storing the result")
        files = []
        for path, sha256 in sorted(done.files.items()):
            source = done.path / path
            files.append(FileEntry(path=path, sha256=sha256, size=source.stat().st_size))
            self._storage.put_file(result_key(self._tenant, self._id, self._attempt, path), source)
        return MergeResult(
            attempt=self._attempt,
            recipe_digest=done.recipe_digest,
            seconds=round(done.seconds, 3),
            files=tuple(files),
            summary=done.report.get("summary", {}),
            imports=imported.commits,
        )

    def _run_engine(self, recipe: Recipe, need: int, out: Path, find: Resolve) -> Any:
        """Run the engine; where memory runs out, leave the merge to a larger worker, or try with less."""
        from merging.engine import merge

        ladder = rungs(need)
        for rung, following in zip(ladder, (*ladder[1:], None), strict=True):
            try:
                return merge(
                    recipe,
                    out,
                    device=rung.device,
                    threads=rung.threads,
                    progress=self._progress,
                    resolve=find,
                )
            except MergeFailure as error:
                if error.code != "out_of_memory":
                    raise
                self._move_up(f"it ran out of memory on {rung}")
                if following is None:
                    raise
                _log.warning("%s ran out of memory on %s; now on %s", self._id, rung, following)
            gc.collect()
            self._advance("starting", 0.0, f"it ran out of memory on {rung}; now on {following}")
        raise AssertionError("a ladder has rungs")

    def _move_up(self, reason: str) -> None:
        """Raise :class:`MovedUp` if a larger worker is there, for which the merge now waits."""
        size = self._jobs.move_up(self._tenant, self._id, self._attempt, worker_memory(), reason)
        if size is not None:
            raise MovedUp(f"{self._id} moved to the workers with {size} GB: {reason}")

    def _publish(self, result: MergeResult) -> None:
        answer = self._jobs.publish(self._tenant, self._id, result)
        prefix = attempts_prefix(self._tenant, self._id)
        if answer != "finished":
            _log.info("the result of %s is not published: %s", self._id, answer)
            self._storage.delete_prefix(f"{prefix}/{self._attempt}")
            self._stopped(answer)
            return
        for key, _ in self._storage.keys(prefix):  # what attempts left that were killed
            if not key.startswith(f"{prefix}/{self._attempt}/"):
                self._storage.delete(key)
        self._push("succeeded")

    def _push(self, state: str) -> None:
        if state == "succeeded" and self._pushes is not None:
            self._pushes.start_waiting(self._tenant, self._id)

    # progress

    def _progress(self, progress: Any) -> None:
        """The engine's callback. Raises :class:`Cancelled` when this attempt is to stop."""
        fraction = _ENGINE_SHARE * progress.done / max(progress.total, 1)
        now = time.monotonic()
        if progress.phase != self._phase or now - self._reported >= _REPORT_SECONDS:
            self._advance(progress.phase, fraction, progress.message)

    def _advance(self, phase: str, fraction: float, message: str) -> None:
        self._phase, self._reported = phase, time.monotonic()
        try:
            answer = self._say(phase, fraction, message)
        except TRANSIENT as error:  # the work is worth more than the report of it
            _log.warning("progress of %s not delivered: %s", self._id, error)
            return
        if answer != "running":
            raise Cancelled(f"the attempt is to stop: {answer}")

    def _say(self, phase: str, fraction: float, message: str) -> str:
        return self._jobs.report(self._tenant, self._id, self._attempt, phase, fraction, message)

    # ends

    def _fail(self, error: MergeError) -> None:
        event(_log, logging.INFO, f"{self._id} failed: {error}", merge=self._id, code=error.code)
        self._jobs.fail(self._tenant, self._id, self._attempt, describe(error))

    def _stopped(self, answer: str) -> None:
        """Complete a cancellation; a superseded or ended merge is none of this attempt's business."""
        if answer == "cancelling":
            error = describe(Cancelled())
            self._jobs.cancelled(self._tenant, self._id, "", error)
