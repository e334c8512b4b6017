"""Time merges of whole checkpoints against a plain streamed sum and against mergekit, side by side.

``python -m benchmarks.checkpoints [--size quick|half|real] [--mergekit PYTHON]``: a base and three
fine-tunes in bf16 (``real``: 1 GB each), one thread, every measurement a process of its own, rounds
interleaved. CPU-seconds and wall seconds are those of the merge (reading, hashing, merging, writing; no
imports); memory is the peak of the anonymous pages of the whole process, sampled, because mapped files are
no memory that a merge needs. Below the table stands what of the promises does not hold, if anything; the
exit status is then 1.

``ours`` runs a recipe (float32 arithmetic), ``ours as mergekit`` the same configuration that mergekit gets.
With ``--equal`` the results of the latter are compared with mergekit's, its sorts made stable and its masks
drawn as ours are (:mod:`benchmarks.mergekit_golden`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.checkpoint_inputs import SHAPES, checkpoint_set

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "sce")
LIMITS = {"linear": 1.3, "task_arithmetic": 1.3, "ties": 4.0, "dare_ties": 4.0}
LIMIT = 5.0
"""Promised times the floor, for the methods that are not in ``LIMITS``."""

ANONYMOUS = 1 << 30
COPIES = 4
"""Promised memory: ``ANONYMOUS`` and so many copies of the largest tensor in float32."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.3},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.3, "density": 0.2},
    "dare_ties": {"weight": 0.3, "density": 0.5},
    "della": {"weight": 0.3, "density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"weight": 0.3, "density": 0.5},
    "sce": {"select_topk": 0.2},
}


@dataclass
class Row:
    """The measurements of one tool and method."""

    tool: str
    method: str
    runs: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None

    def median(self, key: str) -> float:
        return statistics.median(run[key] for run in self.runs)


def configuration(method: str, paths: list[Path]) -> dict[str, Any]:
    """What mergekit gets, and ``ours as mergekit``."""
    models = [{"model": str(path)} for path in paths[1:]]
    found: dict[str, Any] = {"merge_method": method, "models": models, "parameters": PARAMETERS[method]}
    if method != "linear":
        found["base_model"] = str(paths[0])
    return {**found, "dtype": "bfloat16"}


def recipe(method: str, paths: list[Path]) -> dict[str, Any]:
    """The same merge as a recipe. ``linear`` here is the mean of the fine-tunes."""
    shared = {key: value for key, value in PARAMETERS[method].items() if key in ("select_topk",)}
    each = {key: value for key, value in PARAMETERS[method].items() if key not in shared}
    models = [{"model": str(path), "parameters": each} for path in paths[1:]]
    name = "linear" if method == "task_arithmetic" else method
    shared |= {"normalize": True} if method == "linear" else {}
    return {
        "merge_method": name,
        "base_model": str(paths[0]),
        "models": models,
        "parameters": shared,
        "output": {"format": "checkpoint"},
    }


# what runs in the processes of their own


def child(case: dict[str, Any]) -> None:
    """Run one case and print its figures as JSON."""
    step = {"floor": _floor, "ours": _ours, "mergekit": _mergekit}[case["tool"]](case)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}))


def _floor(case: dict[str, Any]) -> Any:
    """Read every tensor of every model, add in float32 in place, round, write. Nothing else."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    folders = [Path(path) for path in case["inputs"]]

    def step() -> None:
        Path(case["out"]).mkdir()
        for shard in sorted(folders[0].glob("*.safetensors")):
            files = [safe_open(folder / shard.name, "pt") for folder in folders]
            with (Path(case["out"]) / shard.name).open("wb") as out:
                for name in files[0].keys():  # noqa: SIM118
                    base = files[0].get_tensor(name).float()
                    total = torch.zeros_like(base)
                    for file in files[1:]:
                        total.add_(file.get_tensor(name).float().sub_(base), alpha=0.3)
                    merged = base.add_(total).bfloat16()
                    out.write(merged.reshape(-1).view(torch.uint8).numpy().data)

    return step


def _ours(case: dict[str, Any]) -> Any:
    from merging import engine

    def step() -> None:
        engine.merge(case["document"], case["out"], device="cpu", threads=case["threads"])

    return step


def _mergekit(case: dict[str, Any]) -> Any:
    import torch
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.set_num_threads(case["threads"])
    if case.get("keys"):
        from benchmarks.mergekit_golden import Pinned

        Pinned(case["keys"]).install()
    config = MergeConfiguration.model_validate(case["document"])
    options = MergeOptions(random_seed=0, quiet=True, num_threads=case["threads"])
    return lambda: run_merge(config, case["out"], options)


# measuring


def measure(python: str, case: dict[str, Any], scratch: Path) -> dict[str, float]:
    """Run a case in a fresh process. Raises :class:`RuntimeError` with the last line of a failure."""
    threads = {"OMP_NUM_THREADS": str(case["threads"]), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    argv = [python, "-m", "benchmarks.checkpoints", "--child", json.dumps(case)]
    before = _children()
    with tempfile.TemporaryFile(dir=scratch) as log:
        process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, **threads}, stdout=log, stderr=log)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines() or ["no output"]
    if process.returncode:
        raise RuntimeError(lines[-1])
    told = json.loads(next(line for line in reversed(lines) if line.startswith('{"cpu"')))
    return {**told, "process": _children() - before, "anonymous": float(peak)}


def _children() -> float:
    """CPU-seconds of all processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def cases(paths: list[Path], options: argparse.Namespace) -> list[tuple[Row, str, dict[str, Any]]]:
    """Every row with its Python and its case."""
    inputs = [str(path) for path in paths]
    common = {"inputs": inputs, "threads": options.threads}
    found = [(Row("floor", "sum"), sys.executable, {"tool": "floor", **common})]
    for method in options.methods:
        config = configuration(method, paths)
        mine = {"tool": "ours", **common}
        found.append((Row("ours", method), sys.executable, {**mine, "document": recipe(method, paths)}))
        found.append((Row("ours as mergekit", method), sys.executable, {**mine, "document": config}))
        if options.mergekit_python:
            case = {"tool": "mergekit", **common, "document": config}
            found.append((Row("mergekit", method), options.mergekit_python, case))
    return found


def run(paths: list[Path], options: argparse.Namespace) -> list[Row]:
    """Measure all rows ``rounds`` times, in turn; mergekit once."""
    found = cases(paths, options)
    for number in range(options.rounds):
        for row, python, case in found:
            if row.error or (row.tool == "mergekit" and number):
                continue
            out = Path(tempfile.mkdtemp(dir=options.scratch)) / "out"
            try:
                row.runs.append(measure(python, {**case, "out": str(out)}, options.scratch))
                print(f"  {row.tool} {row.method}: {row.runs[-1]['cpu']:.2f}", file=sys.stderr)
            except RuntimeError as error:
                row.error = str(error)
                print(f"  {row.tool} {row.method} failed: {error}", file=sys.stderr)
            finally:
                shutil.rmtree(out.parent)
    return [row for row, _, _ in found]


def table(rows: list[Row]) -> str:
    """The table for people."""
    floor = rows[0].median("cpu")
    lines = [
        "| method | tool | CPU-s | x floor | promised | wall s | CPU-s with imports | anonymous MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.runs:
            lines.append(f"| {row.method} | {row.tool} | failed: {row.error} | | | | | |")
            continue
        limit = f"<= {LIMITS.get(row.method, LIMIT):g}" if row.tool == "ours" else ""
        lines.append(
            f"| {row.method} | {row.tool} | {row.median('cpu'):.2f} | {row.median('cpu') / floor:.2f} "
            f"| {limit} | {row.median('wall'):.2f} | {row.median('process'):.2f} "
            f"| {row.median('anonymous') / 1e6:.0f} |"
        )
    return "\n".join(lines)


def broken(rows: list[Row], largest: int) -> list[str]:
    """The promises that do not hold; ``largest`` is the number of entries of the largest tensor."""
    floor, found = rows[0].median("cpu"), []
    room = ANONYMOUS + COPIES * 4 * largest
    for row in rows:
        if row.tool != "ours" or not row.runs:
            continue
        ratio, limit = row.median("cpu") / floor, LIMITS.get(row.method, LIMIT)
        if ratio > limit:
            found.append(f"{row.method}: {ratio:.2f} x floor, promised {limit:g}")
        if row.median("anonymous") > room:
            found.append(f"{row.method}: {row.median('anonymous') / 1e6:.0f} MB, promised {room / 1e6:.0f}")
    return found


def python_of(text: str) -> str:
    """A Python by its path or by that of its virtual environment."""
    path = Path(text)
    return str(path / "bin" / "python") if path.is_dir() else text


def equality(paths: list[Path], options: argparse.Namespace) -> str:
    """How many numbers differ between ours and mergekit's, pinned, method by method."""
    from merging.formats.checkpoint_in import open_checkpoint

    keys = {str(path): open_checkpoint(path).digest for path in paths}
    lines = ["| method | numbers that differ | of |", "|---|---|---|"]
    for method in options.methods:
        folder = Path(tempfile.mkdtemp(dir=options.scratch))
        try:
            common = {"threads": 1, "document": configuration(method, paths)}
            measure(sys.executable, {"tool": "ours", "out": str(folder / "a"), **common}, options.scratch)
            case = {"tool": "mergekit", "out": str(folder / "b"), "keys": keys, **common}
            measure(options.mergekit_python, case, options.scratch)
            differ, total = compared(folder / "a", folder / "b")
            lines.append(f"| {method} | {differ} | {total} |")
        finally:
            shutil.rmtree(folder)
    return "\n".join(lines)


def compared(first: Path, second: Path) -> tuple[int, int]:
    """How many numbers differ between two checkpoints of the same tensors, and how many there are."""
    from safetensors import safe_open

    homes = [
        {name: file for file in sorted(folder.glob("*.safetensors")) for name in safe_open(file, "pt").keys()}  # noqa: SIM118
        for folder in (first, second)
    ]
    if sorted(homes[0]) != sorted(homes[1]):
        raise ValueError("the checkpoints have different tensors")
    differ = total = 0
    for name in homes[0]:
        x, y = (safe_open(home[name], "pt").get_tensor(name) for home in homes)
        differ += int((x != y).sum())
        total += x.numel()
    return differ, total


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    default = Path(tempfile.gettempdir()) / "merganser-bench"
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=sorted(SHAPES), default="quick")
    parser.add_argument("--scratch", type=Path, default=default, help="folder for inputs and results")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--mergekit-python",
        "--mergekit",
        type=python_of,
        help="a Python that has mergekit 0.1.5, or its virtual environment",
    )
    parser.add_argument("--equal", action="store_true", help="compare with mergekit instead of timing")
    options = parser.parse_args(argv)
    if options.child:
        child(json.loads(options.child))
        return 0
    options.scratch.mkdir(parents=True, exist_ok=True)
    paths = checkpoint_set(options.scratch, options.size)
    if options.equal:
        print(equality(paths, options))
        return 0
    rows = run(paths, options)
    print(table(rows))
    data = [{"tool": row.tool, "method": row.method, "error": row.error, "runs": row.runs} for row in rows]
    (options.scratch / "checkpoints.json").write_text(json.dumps(data, indent=1) + "\n")
    wrong = broken(rows, max(math.prod(size) for _, size in SHAPES[options.size].tensors()))
    print("\n" + ("\n".join(f"- {line}" for line in wrong) or "Every promise holds."))
    return int(bool(wrong) or any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
