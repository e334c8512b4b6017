"""The errors Merganser raises on purpose.

Every error has a stable ``code``, one sentence that names the file, module or field, and, where there is
one, the remedy. The command line turns them into exit statuses and the HTTP service into problems.
"""

from __future__ import annotations

from typing import Any


class MergeError(Exception):
    """Base of every deliberate error.

    ``code`` is stable across releases; ``where`` locates the cause with the keys ``file``, ``module``,
    ``field`` and ``model`` as far as they apply.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        remedy: str | None = None,
        where: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy
        self.where = dict(where or {})

    def __str__(self) -> str:
        text = f"{self.message} [{self.code}]"
        return f"{text}. {self.remedy}" if self.remedy else text

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: ``code``, ``message``, ``remedy``, ``where``."""
        return {
            "code": self.code,
            "message": self.message,
            "remedy": self.remedy,
            "where": dict(self.where),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.code, self.message, self.remedy, self.where))


class InputError(MergeError):
    """What the user gave is not acceptable (exit status 2, HTTP 4xx)."""


class MergeFailure(MergeError):
    """Acceptable input, but the work failed (exit status 1, a failed job)."""


class Cancelled(MergeError):
    """A progress callback asked to stop; nothing was written."""

    def __init__(self, message: str = "the merge was cancelled") -> None:
        super().__init__("cancelled", message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Cancelled, (self.message,))


def _rebuild(
    kind: type[MergeError], code: str, message: str, remedy: str | None, where: dict[str, str]
) -> MergeError:
    return kind(code, message, remedy=remedy, where=where)
