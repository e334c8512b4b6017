"""The job that pushes a result to another hub. It may run any number of times, and never harms the result."""

from __future__ import annotations

import logging
from pathlib import Path

import redis
from rq import get_current_job
from rq.timeouts import JobTimeoutException

from merging.errors import MergeError, MergeFailure
from service.broker import TRANSIENT, connect
from service.clock import now
from service.documents import MergeRecord, Push, result_key
from service.errors import Unavailable
from service.jobs import Jobs
from service.logs import event, request_id
from service.problems import describe
from service.pushes import Pushes
from service.remote.hub import RemoteHub
from service.remote.references import Hubs
from service.scratch import scratch
from service.settings import Settings, load_settings
from service.storage import Storage

_log = logging.getLogger("merganser.push")


def run_push(tenant: str, merge_id: str) -> None:
    """Push the result of a merge to where its record says."""
    settings = load_settings()
    connection: redis.Redis = connect(settings, patient=True)
    storage = Storage.open(settings.storage_location, patient=True, keep_free=settings.min_free_bytes)
    jobs = Jobs(connection, storage)
    pushes = Pushes(connection, jobs)
    record = jobs.find(tenant, merge_id)
    if record is None or record.push is None or record.push.ended:
        return
    request_id.set(record.request_id)
    pushes.note(record, record.push.model_copy(update={"state": "running"}))
    done = _outcome(record, record.push, storage, settings)
    event(_log, logging.INFO, f"push of {merge_id}: {done.state}", merge=merge_id, repo=done.repo)
    pushes.note(record, done)


def _outcome(record: MergeRecord, push: Push, storage: Storage, settings: Settings) -> Push:
    """The push as it ended. What may be different next time is raised, for RQ's retry."""
    failure: MergeError
    try:
        with scratch(settings.scratch_dir) as folder:
            commit = _send(record, push, storage, Hubs.of(settings), folder / "result")
    except TRANSIENT:
        raise
    except Unavailable as error:
        job = get_current_job()
        if job is not None and job.retries_left:
            raise
        failure = error
    except MergeError as error:
        failure = error
    except JobTimeoutException:
        failure = MergeFailure("timeout", "the push took longer than a push may take")
    except Exception:
        _log.exception("unexpected error in the push of %s", record.id)
        failure = MergeFailure("internal_error", "an unexpected error happened; it has been logged")
    else:
        return push.model_copy(update={"state": "succeeded", "commit": commit, "finished_at": now()})
    ended = {"state": "failed", "error": describe(failure), "finished_at": now()}
    return push.model_copy(update=ended)


def _send(record: MergeRecord, push: Push, storage: Storage, hubs: Hubs, folder: Path) -> str:
    assert record.result is not None
    hubs.endpoint(push.endpoint, field="push_to.endpoint")  # it may have been taken off the list since
    for entry in record.result.files:
        key = result_key(record.tenant, record.id, record.result.attempt, entry.path)
        try:
            storage.fetch(key, folder / entry.path)
        except FileNotFoundError:
            raise MergeFailure("content_missing", f"{entry.path} of the result is gone") from None
    hubs.demand_push(record.tenant, push.endpoint, push.repo)  # nor may the grant have been taken back
    hub = RemoteHub(push.endpoint, hubs.token_for(record.tenant, push.endpoint, push.repo))
    message = f"Merge by {record.recipe['merge_method']} ({record.id})"
    return hub.push(folder, push.repo, revision=push.revision, private=push.private, message=message)
