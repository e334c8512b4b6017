"""From ``POST /v1/merges`` to the result of a small merge with a worker idle: what the time is made of.

Run ``python -m benchmarks.latency [repeats]``. It starts `merganser up` twice in a folder of its own, with
and without warm work-horses, and tells for each the median of every part in milliseconds:

* request: until the service has answered 202, its checks and the plan included
* queue: from the entry into the queue until a process is started for it (nothing, if one is ready)
* start: Python, RQ and the claim of the merge (with a ready process: the handing over and the claim)
* inputs: the adapters from the storage
* engine: loading torch and the engine
* merge: the engine at work
* publish: the result into the storage and the end of the record
* answer: until the client, which follows the events, knows
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from service.client import Client
from tests.merging.adapters import write_adapter
from tests.running import Up, command, descendants, push, until

PARTS = ("request", "queue", "start", "inputs", "engine", "merge", "publish", "answer")
MODULES = {f"layers.{i}.self_attn.{name}": (256, 256) for i in range(8) for name in ("q_proj", "v_proj")}
_WARM_SECONDS = 60.0
_QUIET_TICKS = 6
"""Hundredths of a second that workers which only ask for work may take in a second."""


def once(up: Up, client: Client, recipe: dict[str, Any]) -> dict[str, float]:
    """The parts of one merge, in seconds."""
    asked = time.time()
    merge_id = client.submit(recipe, fresh=True)["id"]
    accepted = time.time()
    client.wait(merge_id)
    known = time.time()
    moments: dict[str, float] = {}
    for event_id, kind, data in client.events(merge_id):
        name = data["state"] if kind == "state" else data["phase"]
        moments.setdefault(name, int(event_id.partition("-")[0]) / 1000)
    told = start_of(up, merge_id)
    claimed = datetime.fromisoformat(told["at"]).timestamp()
    started = max(claimed - told["process_seconds"], moments["queued"])  # a warm one is older than its job
    return {
        "total": known - asked,
        "request": accepted - asked,
        "queue": max(0.0, started - max(accepted, moments["queued"])),
        "start": moments["running"] - max(started, accepted),
        "inputs": moments["starting"] - moments["running"],
        "engine": moments["prepare"] - moments["starting"],
        "merge": moments["store"] - moments["prepare"],
        "publish": moments["succeeded"] - moments["store"],
        "answer": known - moments["succeeded"],
    }


def start_of(up: Up, merge_id: str) -> dict[str, Any]:
    """What the worker logged when the merge started."""
    lines = [json.loads(line) for line in up.log().splitlines() if line.startswith("{")]
    return next(line for line in lines if line.get("merge") == merge_id and "process_seconds" in line)


def with_torch(up: Up) -> list[str]:
    """The roles of the processes of a service that have torch in their memory."""
    found = []
    for pid in (up.process.pid, *descendants(up.process.pid)):
        try:
            if "libtorch" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8"):
                found.append(command(pid).split("-m ")[-1].strip())
        except OSError:
            continue
    return found


def quiet(up: Up) -> bool:
    """Whether no process of a service does anything for a second; a warm one has then loaded all of torch."""

    def ticks() -> int:
        total = 0
        for pid in descendants(up.process.pid):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total

    before = ticks()
    time.sleep(1.0)
    return ticks() - before <= _QUIET_TICKS


def measure(root: Path, repeats: int, *, warm: bool) -> dict[str, float]:
    """The median of each part, in milliseconds."""
    up = Up(root / str(warm), warm_horses=str(warm).lower())
    try:
        with up.client() as client:
            folders = [write_adapter(root / f"a{i}", seed=i, rank=8, modules=MODULES) for i in range(2)]
            models = [{"model": push(client, folder, f"b/m{i}")} for i, folder in enumerate(folders)]
            recipe = {"merge_method": "ties", "parameters": {"density": 0.5}, "models": models}
            runs = []
            for _ in range(repeats + 1):
                if warm:
                    until(lambda: with_torch(up), what="a work-horse is warm", patience=_WARM_SECONDS)
                until(lambda: quiet(up), what="the service is idle", patience=_WARM_SECONDS)
                print(f"  processes with torch before the request: {with_torch(up) or 'none'}")
                runs.append(once(up, client, recipe))
    finally:
        up.stop()
    return {name: 1000 * statistics.median(run[name] for run in runs[1:]) for name in ("total", *PARTS)}


def main() -> None:
    """Measure and print both ways."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: measure(Path(folder), repeats, warm=warm)
            for name, warm in (("cold", False), ("warm", True))
        }
    print(f"{'ms':>6} {'total':>8} " + " ".join(f"{name:>8}" for name in PARTS))
    for name, row in found.items():
        print(f"{name:>6} {row['total']:8.0f} " + " ".join(f"{row[part]:8.0f}" for part in PARTS))


if __name__ == "__main__":
    main()
