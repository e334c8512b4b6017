"""A work-horse that has loaded torch before its job comes. It runs one job, as every work-horse does."""

from __future__ import annotations

import contextlib
import json
import os
import sys

from workers import environment as env

COMMAND = [sys.executable, "-m", "workers.horse"]


class WarmHorse:
    """A started work-horse that waits for its job at its standard input. It dies with this process."""

    def __init__(self) -> None:
        reading, self._writing = os.pipe()
        environment = {**os.environ, env.WARM: "1", env.WORKER_PID: str(os.getpid())}
        self.pid = os.posix_spawn(
            sys.executable,
            COMMAND,
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0)],
            setpgroup=0,
        )
        os.close(reading)

    def give(self, job: dict[str, str]) -> int | None:
        """Name it its job, as variables for its environment; its process id, or None if it is dead."""
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(self.pid, os.WNOHANG)[0] == self.pid:
                os.close(self._writing)
                return None
        try:
            with os.fdopen(self._writing, "w", encoding="utf-8") as pipe:
                pipe.write(json.dumps(job) + "\n")
        except BrokenPipeError:
            os.waitpid(self.pid, 0)
            return None
        return self.pid


def await_job() -> dict[str, str] | None:
    """In the work-horse: load what the job needs, then wait for it. None if the worker wants none."""
    import torch

    import merging.engine  # noqa: F401  (what the job imports, so that it need not)
    import workers.tasks  # noqa: F401

    if os.environ.get(env.DEVICE) == "cuda":
        torch.zeros(1, device="cuda")  # its context alone takes a while
    line = sys.stdin.readline()
    job: dict[str, str] | None = json.loads(line) if line else None
    return job
