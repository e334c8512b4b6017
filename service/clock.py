"""Time, as it is written into records."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """UTC with milliseconds: ``2026-01-31T12:00:00.000Z``."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def millis(moment: str) -> int:
    """Milliseconds since the epoch of a moment written by :func:`now`."""
    return round(datetime.fromisoformat(moment).timestamp() * 1000)


def at(milliseconds: int) -> str:
    """The moment so many milliseconds after the epoch, as :func:`now` writes it."""
    moment = datetime.fromtimestamp(milliseconds // 1000, UTC).replace(microsecond=milliseconds % 1000 * 1000)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
