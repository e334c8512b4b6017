"""The events of a merge, as they happen (server-sent events)."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.broker import events_key, merge_key, text
from service.deps import Services, ServicesDep, TenantDep
from service.documents import FINAL, MergeRecord
from service.fanout import Event
from service.routers.merges import MergeId

router = APIRouter(prefix="/v1/merges", tags=["merges"])

_LIFE_SECONDS = 600
_ID_PATTERN = r"^[0-9]{1,19}-[0-9]{1,19}$"
"""Redis refuses what has more than 64 bits, and one reader asks it for all listeners."""


def _merge(services: ServicesDep, tenant: TenantDep, merge_id: MergeId) -> MergeRecord:
    """A dependency, so that a missing merge is a 404 and not an empty stream."""
    return services.jobs.get(tenant, merge_id)


@router.get("/{merge_id}/events", response_class=EventSourceResponse)
async def merge_events(
    services: ServicesDep,
    record: Annotated[MergeRecord, Depends(_merge)],
    last_event_id: Annotated[
        str | None, Header(description="Go on after this event", pattern=_ID_PATTERN)
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Events `state` and `progress` from the beginning, or after `Last-Event-ID`, to the end of the merge.

    The data of an event is a JSON object. The stream ends after the final state; it may end earlier, after
    ten minutes or when the service stops, and is then to be resumed.
    """
    key = events_key(record.tenant, record.id)
    position = last_event_id or "0-0"
    deadline = time.monotonic() + _LIFE_SECONDS
    ended = await _ended(services, record)  # before reading: its last event is then in the stream
    if not ended:
        async with aclosing(services.fanout.follow(key, position)) as events:
            async for event in events:
                if event is not None:
                    position = event.id
                    yield _sent(event)
                    if _is_final(event):
                        return
                elif await _ended(services, record):
                    break
                if time.monotonic() > deadline:
                    return
            else:
                return  # the service stops
    async for event in services.fanout.past(key, position):
        yield _sent(event)
    if not await services.events.exists(key):  # kept for a while only; the record says the same
        yield await _last(services, record)


def _sent(event: Event) -> ServerSentEvent:
    return ServerSentEvent(raw_data=event.data, event=event.kind, id=event.id)


def _is_final(event: Event) -> bool:
    return event.kind == "state" and json.loads(event.data)["state"] in FINAL


async def _ended(services: Services, record: MergeRecord) -> bool:
    state = await services.events.hget(merge_key(record.tenant, record.id), "state")
    return state is None or text(state) in FINAL


async def _last(services: Services, record: MergeRecord) -> ServerSentEvent:
    final = await run_in_threadpool(services.jobs.get, record.tenant, record.id)
    data: dict[str, Any] = {"state": final.state, "at": final.finished_at}
    if final.error is not None:
        data["error"] = final.error
    return ServerSentEvent(data=data, event="state")
