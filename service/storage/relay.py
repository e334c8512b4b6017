"""Pass chunks from a download into an upload: the store's client cannot do both in one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator

_AHEAD = 2
_WAIT_SECONDS = 0.5


def relayed(chunks: Callable[[], Iterable[bytes]]) -> Iterator[bytes]:
    """The chunks, fetched by a thread of their own, a few ahead; it raises what fetching raises."""
    passed: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)
    given_up = threading.Event()

    def give(item: bytes | BaseException | None) -> bool:
        while not given_up.is_set():
            try:
                passed.put(item, timeout=_WAIT_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def fetch() -> None:
        try:
            for chunk in chunks():
                if not give(chunk):
                    return
        except BaseException as error:
            give(error)
        else:
            give(None)

    thread = threading.Thread(target=fetch, name="relay", daemon=True)
    thread.start()
    try:
        while (item := passed.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        given_up.set()
