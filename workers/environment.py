"""The environment of worker processes: how a supervisor tells them who and where they are."""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from pathlib import Path

from service.remote.hub import QUIET
from service.settings import Settings

SUPERVISOR_PID = "MERGANSER_SUPERVISOR_PID"
WORKER_PID = "MERGANSER_WORKER_PID"
WORKER_NAME = "MERGANSER_WORKER_NAME"
QUEUE = "MERGANSER_WORKER_QUEUE"
DEVICE = "MERGANSER_WORKER_DEVICE"
MEMORY = "MERGANSER_WORKER_BYTES"
WARM = "MERGANSER_WORKER_WARM"
THREADS = "MERGANSER_WORKER_THREADS"

_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def process_seconds() -> float:
    """How long this process has lived."""
    if sys.platform != "linux":
        return time.process_time()
    ticks = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def child(settings: Settings, **more: str) -> dict[str, str]:
    """This process's environment with the settings spelled out, for a worker of ours.

    Small QR and SVD problems are fastest on one thread each, and idle OpenMP threads must not spin; the
    engine spreads modules over threads of its own. The module search path leads to this very package,
    whatever folder the user started us in.
    """
    environment = {**os.environ, **QUIET, **dict.fromkeys(_ONE_THREAD, "1"), "OMP_WAIT_POLICY": "PASSIVE"}
    for name, value in settings.model_dump(mode="json").items():
        if value is not None:
            environment[f"MERGANSER_{name.upper()}"] = str(value)
    root = Path(__file__).resolve().parents[1]
    environment["PYTHONSAFEPATH"] = "1"
    if root not in (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")):
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *([path] if path else [])])
    return {**environment, **more}
