"""How much memory each worker has: what the operator says, or what the machine tells without torch."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from service.settings import Settings
from workers.devices import Device

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def of(device: Device, devices: Sequence[Device], settings: Settings) -> int:
    """Bytes for the worker of ``device``, one of ``devices``; 0 for a GPU that nothing is known of."""
    if settings.worker_memory is not None:
        return int(settings.worker_memory)
    if device.kind == "cpu":
        return machine() // max(1, sum(other.kind == "cpu" for other in devices))
    return _gpu(device.gpu)


def machine() -> int:
    """The memory of this machine, or of the container that this process is in."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file; or "max"
            found.append(int(Path(path).read_text()))
    return min(found)


def _gpu(name: str) -> int:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    query = [tool, "-i", name, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return int(answer.stdout.split()[0]) << 20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 0


def confine(limit: int) -> None:
    """Let this process have at most ``limit`` bytes of its own, so that it fails and not its machine."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
