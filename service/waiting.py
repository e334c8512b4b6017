"""`Prefer: wait=N` (RFC 7240): hold an answer back until a merge has ended, for a while."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re

from service.broker import events_key
from service.deps import Services
from service.documents import FINAL

LONGEST_WAIT = 60
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})", re.IGNORECASE | re.ASCII)


def preferred_wait(header: str | None) -> int | None:
    """The seconds that a ``Prefer`` header asks for, at most 60, or None."""
    match = _WAIT.search(header or "")
    return min(int(match.group(1)), LONGEST_WAIT) if match else None


async def until_end(services: Services, tenant: str, merge_id: str, seconds: float) -> None:
    """Return when a merge has ended, or after ``seconds``, or when the service stops."""
    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(seconds),
            contextlib.aclosing(services.fanout.follow(events_key(tenant, merge_id), "0-0")) as events,
        ):
            async for event in events:
                if event and event.kind == "state" and json.loads(event.data)["state"] in FINAL:
                    return
