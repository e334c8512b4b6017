"""The job class: runs our own functions only.

Whoever can write to Redis can enqueue a job that names any importable function. The names that may run are
therefore listed here, and callbacks by name are ignored.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from rq.job import Job

from service.broker import FINISH_TASK, PUSH_TASK, SHARD_TASK, TASK

ALLOWED = (TASK, SHARD_TASK, FINISH_TASK, PUSH_TASK)


class ForbiddenFunction(Exception):
    """A job names a function that is not ours."""


class MergeJob(Job):
    """A job whose function is on the list."""

    @property
    def func(self) -> Callable[..., Any]:
        """The function to run. Raises :class:`ForbiddenFunction`."""
        name = self.func_name
        if name not in ALLOWED or self.instance:
            raise ForbiddenFunction(f"job {self.id} names the function {name!r}")
        module, _, attribute = name.rpartition(".")
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return found

    @property
    def success_callback(self) -> None:
        """Never any: a name in Redis must not decide what code runs."""

    @property
    def failure_callback(self) -> None:
        """Never any."""

    @property
    def stopped_callback(self) -> None:
        """Never any."""
