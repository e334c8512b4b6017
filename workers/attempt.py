"""One attempt of one merge, as the jobs that work on it share it: reports, and ends that cannot be undone.

An error of the input, or of the merge, ends the merge; what may be different next time (Redis or the storage
away, the process killed) is left to RQ's retry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from rq.timeouts import JobTimeoutException

from merging.errors import Cancelled, MergeError, MergeFailure
from service.broker import TRANSIENT
from service.documents import MergeResult, attempts_prefix
from service.errors import Unavailable
from service.inspection import hide_folder
from service.jobs import MAX_RETRIES, Jobs
from service.logs import event
from service.problems import describe
from service.pushes import Pushes
from service.quota import Reservations
from service.storage import Storage, is_full, scratch_full
from workers.rungs import MovedUp, worker_memory

_REPORT_SECONDS = 0.2
_FULL = scratch_full()
_log = logging.getLogger("merganser.task")


class Attempt:
    """One attempt of one merge."""

    def __init__(
        self,
        tenant: str,
        merge_id: str,
        attempt: str,
        jobs: Jobs,
        storage: Storage,
        pushes: Pushes | None = None,
        room: Reservations | None = None,
    ) -> None:
        self._pushes = pushes
        self._room = room
        self._folder: Path | None = None
        self._tenant = tenant
        self._id = merge_id
        self._attempt = attempt
        self._jobs = jobs
        self._storage = storage
        self._reported = 0.0
        self._phase = ""

    @property
    def name(self) -> str:
        """The attempt's own id."""
        return self._attempt

    def guarded(self, work: Callable[[], None], folder: Path) -> None:
        """Do the work; what goes wrong for good ends the merge. ``folder`` is hidden from messages."""
        self._folder = folder
        try:
            work()
        except Cancelled:
            self.stopped(self.say("stopping", 0.0, ""))
        except MovedUp:
            raise  # to RQ, which queues the job again, for a larger worker
        except Unavailable as error:
            if self._is_tried_again():
                raise
            self.fail(error)
        except MergeError as error:
            if error.code == _FULL.code and self._is_tried_again():
                raise  # maybe by a worker with another disk
            self.fail(hide_folder(hide_folder(error, folder / "inputs"), folder))
        except JobTimeoutException:
            self.fail(MergeFailure("timeout", "the merge took longer than a merge may take"))
        except (*TRANSIENT, OSError) as error:
            full = isinstance(error, OSError) and is_full(error)
            if not full or self._is_tried_again():
                raise
            self.fail(_FULL)
        except Exception as error:
            if _no_memory(error):
                self.move_up("it ran out of memory")
                self.fail(MergeFailure("out_of_memory", "the merge does not fit into this worker's memory"))
                return
            _log.exception("unexpected error in %s", self._id)
            self.fail(MergeFailure("internal_error", "an unexpected error happened; it has been logged"))

    def _is_tried_again(self) -> bool:
        return self._jobs.get(self._tenant, self._id).attempts <= MAX_RETRIES

    def move_up(self, reason: str) -> None:
        """Raise :class:`MovedUp` if a larger worker is there, for which the merge now waits."""
        size = self._jobs.move_up(self._tenant, self._id, self._attempt, worker_memory(), reason)
        if size is not None:
            raise MovedUp(f"{self._id} moved to the workers with {size} GB: {reason}")

    # progress

    def tick(self, phase: str, fraction: float, message: str) -> None:
        """Report, if the phase is new or the last report is old. Raises :class:`Cancelled`, if so asked."""
        if phase != self._phase or time.monotonic() - self._reported >= _REPORT_SECONDS:
            self.advance(phase, fraction, message)

    def advance(self, phase: str, fraction: float, message: str) -> None:
        """Report now. Raises :class:`Cancelled` when this attempt is to stop, and ``scratch_full``."""
        self._phase, self._reported = phase, time.monotonic()
        if self._folder is not None:
            self._storage.demand_scratch(self._folder)
        try:
            answer = self.say(phase, fraction, message)
        except TRANSIENT as error:  # the work is worth more than the report of it
            _log.warning("progress of %s not delivered: %s", self._id, error)
            return
        if answer != "running":
            raise Cancelled(f"the attempt is to stop: {answer}")

    def say(self, phase: str, fraction: float, message: str) -> str:
        """Report; the state of the merge, or 'superseded'."""
        return self._jobs.report(self._tenant, self._id, self._attempt, phase, fraction, message)

    # what the tenant may store

    def reserve(self, size: int) -> None:
        """Count what this merge is about to store; again renews that. Raises ``quota_exceeded``."""
        if self._room is not None:
            self._room.reserve_result(self._tenant, self._id, size)

    def _release(self) -> None:
        """The merge has ended: a result counts by itself."""
        if self._room is not None:
            self._room.settle(self._tenant, self._id, kept=0)

    # ends

    def publish(self, result: MergeResult) -> None:
        """End the merge with a result and remove what other attempts left."""
        answer = self._jobs.publish(self._tenant, self._id, result)
        prefix = attempts_prefix(self._tenant, self._id)
        if answer != "finished" and not self._is_published():
            _log.info("the result of %s is not published: %s", self._id, answer)
            self._storage.delete_prefix(f"{prefix}/{self._attempt}")
            self.stopped(answer)
            return
        self._release()
        for key, _ in self._storage.keys(prefix):  # what attempts left that were killed
            if not key.startswith(f"{prefix}/{self._attempt}/"):
                self._storage.delete(key)
        self.push("succeeded")

    def _is_published(self) -> bool:
        """Whether this attempt published before: the answer was lost, or its last job ran twice."""
        record = self._jobs.find(self._tenant, self._id)
        return record is not None and record.result is not None and record.result.attempt == self._attempt

    def push(self, state: str) -> None:
        """Send the result on its way to another hub, if it succeeded and that was asked for."""
        if state == "succeeded" and self._pushes is not None:
            self._pushes.start_waiting(self._tenant, self._id)

    def fail(self, error: MergeError) -> None:
        """End the merge with an error."""
        event(_log, logging.INFO, f"{self._id} failed: {error}", merge=self._id, code=error.code)
        if self._jobs.fail(self._tenant, self._id, self._attempt, describe(error)) == "finished":
            self._release()

    def stopped(self, answer: str) -> None:
        """Complete a cancellation; a superseded or ended merge is none of this attempt's business.

        But whoever published it may have been killed right after that, before the push was started.
        """
        if answer == "cancelling":
            error = describe(Cancelled())
            self._jobs.cancelled(self._tenant, self._id, "", error)
            self._release()
        self.push(answer)


def _no_memory(error: Exception) -> bool:
    from merging.engine import out_of_memory

    return out_of_memory(error)
