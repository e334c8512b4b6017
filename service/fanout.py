"""The events of merges for many listeners: one reader for all of them, whatever their number.

A listener first reads what is there already, then what the reader hands on. Both are told apart by the ids
of the events, so nothing comes twice and nothing is missed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from service.broker import TRANSIENT, text

_BLOCK_MILLIS = 200
"""So long a new stream may wait until the reader takes notice of it."""
_PAUSE_SECONDS = 0.5
_TICK_SECONDS = 1.0
_COUNT = 500
_BACKLOG = 1000


@dataclass(frozen=True)
class Event:
    """One entry of a stream."""

    id: str
    kind: str
    data: str


@dataclass
class _Listener:
    """What one listener has still to take. ``behind``: it must read the stream itself first."""

    pending: deque[Event] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    behind: bool = True

    def offer(self, events: list[Event]) -> None:
        if len(self.pending) + len(events) > _BACKLOG:  # it is slow; the stream keeps them for it
            self.pending.clear()
            self.behind = True
        else:
            self.pending.extend(events)
        self.wake.set()


@dataclass
class _Stream:
    position: str
    listeners: list[_Listener] = field(default_factory=list)


class Fanout:
    """The reader and its listeners. It ends with ``closing``."""

    def __init__(self, connection: Redis, closing: asyncio.Event) -> None:
        self._redis = connection
        self._closing = closing
        self._streams: dict[str, _Stream] = {}
        self._reader: asyncio.Task[None] | None = None

    @property
    def listening(self) -> int:
        """How many listeners there are."""
        return sum(len(stream.listeners) for stream in self._streams.values())

    async def past(self, key: str, after: str) -> AsyncIterator[Event]:
        """What a stream holds after an id at the moment."""
        while True:
            found: Any = await self._redis.xrange(key, min=f"({after}", count=_COUNT)
            for entry in found:
                event = _event(entry)
                after = event.id
                yield event
            if len(found) < _COUNT:
                return

    async def follow(self, key: str, after: str) -> AsyncGenerator[Event | None, None]:
        """The events after an id, without end; None about every second, for a look at other things."""
        listener = self._enter(key, after)
        try:
            while not self._closing.is_set():
                listener.wake.clear()
                if listener.behind:
                    listener.behind = False
                    async for event in self.past(key, after):
                        after = event.id
                        yield event
                while listener.pending and not listener.behind:
                    event = listener.pending.popleft()
                    if _order(event.id) > _order(after):
                        after = event.id
                        yield event
                if not listener.behind:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(listener.wake.wait(), _TICK_SECONDS)
                        continue
                    yield None
        finally:
            self._leave(key, listener)

    def _enter(self, key: str, after: str) -> _Listener:
        listener = _Listener()
        self._streams.setdefault(key, _Stream(after)).listeners.append(listener)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        return listener

    def _leave(self, key: str, listener: _Listener) -> None:
        stream = self._streams[key]
        stream.listeners.remove(listener)
        if not stream.listeners:
            del self._streams[key]

    async def _read(self) -> None:
        while self._streams and not self._closing.is_set():
            positions: dict[Any, Any] = {key: stream.position for key, stream in self._streams.items()}
            try:
                found: Any = await self._redis.xread(positions, count=_COUNT, block=_BLOCK_MILLIS)
            except TRANSIENT:
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            for key, entries in found or ():
                stream = self._streams.get(text(key))
                if stream is not None:
                    events = [_event(entry) for entry in entries]
                    stream.position = events[-1].id
                    for listener in stream.listeners:
                        listener.offer(events)


def _event(entry: Any) -> Event:
    entry_id, fields = entry
    return Event(text(entry_id), text(fields[b"event"]), text(fields[b"data"]))


def _order(event_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in event_id.split("-"))
