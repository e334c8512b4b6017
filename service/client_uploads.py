"""The client's side of uploads in parts: send what is missing, several parts at once, as often as needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from merging.errors import MergeError

PARTS_ABOVE = 64 << 20
"""Files of more bytes are sent in parts."""
PARTS_AT_ONCE = 4
PART_BYTES: int | None = None
"""What to ask for; the service knows best."""
_CHUNK = 1 << 20
_ROUNDS = 5
_PAUSE_SECONDS = 0.5
_COMPLETE_SECONDS = 1800.0
_PASSING = ("service_unreachable", "storage_unavailable", "redis_unavailable")
"""Errors of the service that may be over a little later."""
_AGAIN = (403, 408, 429, 500, 502, 503, 504)
"""Answers after which the rest is tried once more, with new URLs."""

Call = Callable[..., httpx.Response]
"""``call(method, path, **options)``: the answer of the service, which is no error."""


@dataclass(frozen=True)
class _Part:
    number: int
    offset: int
    size: int
    url: str


class PartsNotSent(Exception):
    """Some parts could not be sent, though they were tried several times. ``status``: of the last answer."""

    def __init__(self, status: int | None, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def send_in_parts(
    call: Call, bare: httpx.Client, file: Path, announcement: Mapping[str, Any]
) -> dict[str, Any]:
    """Upload a file in parts; the session, complete. What an earlier try has sent is not sent again.

    ``bare`` has no key, because the URLs of parts may lead elsewhere. Raises :class:`PartsNotSent` and
    whatever ``call`` raises.
    """
    wanted = {**announcement, "part_size": PART_BYTES}
    patience = time.monotonic() + _COMPLETE_SECONDS
    attempt = 0
    while True:
        trouble: Exception | None
        try:
            session: dict[str, Any] = call("POST", "/v1/uploads", json=wanted).json()
            if session["state"] == "complete":
                return session
            trouble = _send(bare, file, _missing(session))
            if trouble is None:
                return _complete(call, session)
            if trouble.status not in (None, *_AGAIN):
                raise trouble
        except MergeError as error:
            if error.code == "upload_busy" and time.monotonic() < patience:
                time.sleep(_PAUSE_SECONDS)  # an earlier request is still joining the parts
                continue
            if error.code not in _PASSING:
                raise
            trouble = error
        attempt += 1
        if attempt == _ROUNDS:
            raise trouble
        time.sleep(_PAUSE_SECONDS * 2**attempt)


def _complete(call: Call, session: Mapping[str, Any]) -> dict[str, Any]:
    path = f"/v1/uploads/{session['id']}/complete"
    done: dict[str, Any] = call("POST", path, timeout=_COMPLETE_SECONDS).json()
    return done


def _missing(session: Mapping[str, Any]) -> list[_Part]:
    urls = {int(k): v for k, v in session["actions"]["upload"]["header"].items() if k.isdecimal()}
    step = int(session["part_size"])
    return [
        _Part(part["number"], (part["number"] - 1) * step, part["size"], urls[part["number"]])
        for part in session["parts"]
        if not part["received"]
    ]


def _send(bare: httpx.Client, file: Path, parts: list[_Part]) -> PartsNotSent | None:
    """Send parts; what kept the last of those from arriving that did not."""
    with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="upload") as pool:
        return next((found for found in pool.map(lambda p: _put(bare, file, p), parts) if found), None)


def _put(bare: httpx.Client, file: Path, part: _Part) -> PartsNotSent | None:
    headers = {"Content-Length": str(part.size), "Content-Type": "application/octet-stream"}
    try:
        answer = bare.put(part.url, content=_chunks(file, part), headers=headers)
    except httpx.TransportError as error:
        return PartsNotSent(None, f"part {part.number} broke off: {error}")
    if answer.is_error:
        return PartsNotSent(answer.status_code, f"part {part.number} was answered {answer.status_code}")
    return None


def _chunks(file: Path, part: _Part) -> Iterator[bytes]:
    left = part.size
    with file.open("rb") as stream:
        stream.seek(part.offset)
        while left:
            chunk = stream.read(min(_CHUNK, left))
            if not chunk:
                return  # it was cut; the service notices
            left -= len(chunk)
            yield chunk
