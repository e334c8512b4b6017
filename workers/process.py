"""The process of one worker, started by the supervisor, with which it dies."""

from __future__ import annotations

import os
import signal
import sys

from service import deathsig
from service.broker import PRIORITIES, connect, queue_name
from service.logs import configure
from service.settings import load_settings
from service.sizes import served_with
from workers import environment as env
from workers.worker import MergeWorker


def main() -> int:
    """Work until SIGTERM."""
    deathsig.die_with_parent(int(os.environ[env.SUPERVISOR_PID]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure()
    settings = load_settings()
    sizes = served_with(int(os.environ[env.MEMORY]))
    worker = MergeWorker(
        [queue_name(priority, size) for priority in PRIORITIES for size in sizes],
        name=os.environ[env.WORKER_NAME],
        connection=connect(settings, patient=True),
        warm=settings.warm_horses,
    )
    worker.warm_up()
    worker.work(logging_level="WARNING")
    return 0


if __name__ == "__main__":
    sys.exit(main())
