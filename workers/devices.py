"""Which devices this machine gives to workers. Found without torch, which must not touch CUDA here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from merging.errors import InputError

_CUDA = re.compile(r"^cuda(?::(\d+))?$")


@dataclass(frozen=True)
class Device:
    """One worker's device: ``cpu``, or ``cuda`` with the GPU that the worker alone sees."""

    kind: str
    gpu: str = ""

    @property
    def label(self) -> str:
        """A short name for logs and worker names."""
        return "cpu" if self.kind == "cpu" else f"gpu-{self.gpu}"


def parse(text: str) -> tuple[Device, ...]:
    """The devices of the setting ``DEVICES``. Raises ``devices_invalid``."""
    if text.strip() == "auto":
        return tuple(Device("cuda", gpu) for gpu in _gpus()) or (Device("cpu"),)
    found = []
    for item in (part.strip() for part in text.split(",")):
        match = _CUDA.match(item)
        if item == "cpu":
            found.append(Device("cpu"))
        elif match:
            found.append(Device("cuda", match.group(1) or "0"))
        else:
            raise InputError(
                "devices_invalid",
                f"MERGANSER_DEVICES: {item!r} is not a device",
                remedy="Use auto, or a list such as cpu or cuda:0,cuda:1",
                where={"field": "MERGANSER_DEVICES"},
            )
    return tuple(found)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES lists, or else all GPUs that the driver's tool reports."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [item.strip() for item in visible.split(",") if item.strip() and item.strip() != "-1"]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip().startswith("GPU-")]
