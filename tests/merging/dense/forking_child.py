"""Run merges in children of one warm process, so that a test can kill them: ``recipe out log`` per line.

Each answer is the process id of the child, then its status when it has ended. A child writes a byte into
its log for every finished tensor, and takes its time over it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import merging.engine

SHARD_BYTES = 700
PAUSE = 0.004


def child(recipe: str, out: str, log: str) -> None:
    def tick(progress: merging.engine.Progress) -> None:
        if progress.phase == "merge":
            with Path(log).open("ab") as file:
                file.write(b".")
            time.sleep(PAUSE)

    merging.engine.merge(
        recipe, out, device="cpu", threads=1, progress=tick, shard_bytes=SHARD_BYTES, overwrite=True
    )


def say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(*line.split())
            os._exit(0)
        say(pid)
        say(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main()
