"""Time the merge step against its floor and against PEFT, side by side in one run.

Every measurement is a process of its own with one thread. Numbers are CPU-seconds of the merge step alone
(reading, hashing, merging, writing; no imports), medians over the rounds; rounds are interleaved, so that a
machine that is busy for a while is so for all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.cases import Case
from benchmarks.inputs import SETS, adapter_set

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """The measurements of a case."""

    case: Case
    runs: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None

    def median(self, key: str) -> float:
        return statistics.median(run[key] for run in self.runs)


def measure(case: Case, scratch: Path) -> dict[str, float]:
    """Run a case in a fresh process. Raises :class:`RuntimeError` with the last line of a failure."""
    inputs = [str(path) for path in adapter_set(scratch, case.set)]
    out = Path(tempfile.mkdtemp(dir=scratch)) / "out"
    try:
        spec = {"tool": case.tool, "set": case.set, "inputs": inputs, "out": str(out), **case.options}
        argv = [sys.executable, "-m", "benchmarks.child", json.dumps(spec)]
        if case.process:
            argv = [sys.executable, "-m", "service", *_command(case, inputs, out)]
        with tempfile.TemporaryFile(dir=scratch) as log:
            started = time.perf_counter()
            process = subprocess.Popen(argv, cwd=ROOT, env=_environment(), stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            wall = time.perf_counter() - started
            log.seek(0)
            text = log.read().decode(errors="replace").strip()
        if process.returncode:
            raise RuntimeError((text.splitlines() or ["no output"])[-1])
        return _result(case, text, usage, wall)
    finally:
        shutil.rmtree(out.parent)


def _result(case: Case, text: str, usage: resource.struct_rusage, wall: float) -> dict[str, float]:
    total = usage.ru_utime + usage.ru_stime
    found = {"process": total, "peak": float(usage.ru_maxrss * 1024)}
    if case.process:
        return {**found, "cpu": total, "wall": wall}
    told = json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{")))
    return {**found, "cpu": told["cpu"], "wall": told["wall"], "before": told["before"]}


def _command(case: Case, inputs: list[str], out: Path) -> list[str]:
    recipe = out.with_name("recipe.json")
    recipe.write_text(json.dumps({"models": [{"model": path} for path in inputs], **case.options["recipe"]}))
    return ["merge", str(recipe), "--out", str(out), "--device", "cpu", "--threads", "1"]


def _environment() -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(wanted: Iterable[Case], scratch: Path, rounds: int) -> list[Row]:
    """Measure all cases ``rounds`` times, in turn. A case that fails says why and is not repeated."""
    rows = [Row(case) for case in wanted]
    for number in range(rounds):
        for row in rows:
            if row.error or (row.case.once and number):
                continue
            try:
                row.runs.append(measure(row.case, scratch))
                print(f"  {row.case.set:5} {row.case.name}: {row.runs[-1]['cpu']:.2f}", file=sys.stderr)
            except RuntimeError as error:
                row.error = str(error)
                print(f"  {row.case.set:5} {row.case.name}: failed: {error}", file=sys.stderr)
    return rows


def ratios(rows: list[Row]) -> list[dict[str, Any]]:
    """The table as data; ``x`` is the ratio to the floor of the same set."""
    floors = {(row.case.set, row.case.name): row.median("cpu") for row in rows if row.runs}
    entries = []
    for row in rows:
        entry: dict[str, Any] = {"set": row.case.set, "name": row.case.name, "error": row.error}
        if row.runs:
            entry |= {key: row.median(key) for key in row.runs[0]}
            entry["runs"] = [run["cpu"] for run in row.runs]
            floor = floors.get((row.case.set, row.case.floor or ""))
            entry["x"] = entry["cpu"] / floor if floor and not row.case.process else None
            entry["limit"] = row.case.limit
        entries.append(entry)
    return entries


def markdown(entries: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| set | what | CPU-s | x floor | promised | wall s | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        if "cpu" not in entry:
            lines.append(f"| {entry['set']} | {entry['name']} | failed: {entry['error']} | | | | |")
            continue
        ratio = f"{entry['x']:.2f}" if entry["x"] else ""
        limit = f"<= {entry['limit']:g}" if entry["limit"] else ""
        lines.append(
            f"| {entry['set']} | {entry['name']} | {entry['cpu']:.2f} | {ratio} | {limit} "
            f"| {entry['wall']:.2f} | {entry['peak'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def extrapolated(entries: list[dict[str, Any]]) -> float | None:
    """CPU-seconds that PEFT's svd would take on the big set, from one layer of each shape."""
    parts = {entry["name"]: entry["cpu"] for entry in entries if "cpu" in entry}
    total = 0.0
    for name, count in cases.ONE_OF_EACH.items():
        part = parts.get(f"PEFT svd, one {name.partition('.')[2]}")
        if part is None:
            return None
        total += part * count
    return total * SETS["big"].layers


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    default = Path(tempfile.gettempdir()) / "merganser-bench"
    parser.add_argument("--scratch", type=Path, default=default, help="folder for inputs and results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, without what takes long")
    parser.add_argument("--full-space", action="store_true", help="TIES in full space too (minutes)")
    parser.add_argument("--whole-model", action="store_true", help="the adapters of an 8B model too (1.3 GB)")
    parser.add_argument("--peft-svd", action="store_true", help="PEFT's svd on single big layers (minutes)")
    parser.add_argument("--core-space-reference", help="a checkout of the Core Space authors' repository")
    parser.add_argument("--only", help="only cases whose name contains this, and the floors")
    options = parser.parse_args(argv)
    options.scratch.mkdir(parents=True, exist_ok=True)
    entries = ratios(run(_chosen(options), options.scratch, 1 if options.quick else options.rounds))
    print(markdown(entries))
    whole = extrapolated(entries)
    if whole is not None:
        print(
            f"\nPEFT svd on the whole big set, extrapolated from one layer of each shape: {whole:.0f} CPU-s"
        )
    data = {"machine": _machine(), "extrapolated_peft_svd": whole, "rows": entries}
    (options.scratch / "speed.json").write_text(json.dumps(data, indent=1) + "\n")
    print(f"\nwritten to {options.scratch / 'speed.json'}")
    return int(any(entry["error"] for entry in entries))


def _chosen(options: argparse.Namespace) -> list[Case]:
    from merging import catalog

    chosen = list(cases.table(set(catalog.names()), quick=options.quick))
    if options.full_space:
        chosen += cases.full_space()
    if options.whole_model:
        chosen += cases.whole_model()
    if options.peft_svd:
        chosen += cases.peft_svd_parts()
    if options.core_space_reference:
        chosen += cases.core_space_reference(options.core_space_reference)
    if options.only:
        chosen = [case for case in chosen if options.only in case.name or case.tool == "floor"]
    return chosen


def _machine() -> dict[str, Any]:
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "load": os.getloadavg(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
