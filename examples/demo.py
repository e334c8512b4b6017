"""The whole of Merganser in a few seconds: ``make demo``.

Starts ``merganser up`` in a temporary folder on a free loopback port, uploads the four example adapters over
HTTP, merges them with TIES in full space and in Core Space, follows the events, downloads the results into
``demo-output``, checks them, prints what came out, and takes everything down.

Where PEFT and transformers are installed (extra ``eval``) and the folder with the base model and the tasks
is at hand (``--quality``, by default ``../shared/quality``), it ends with the accuracy per task before and
after.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from merging.formats.adapter import open_adapter
from merging.recipe import Recipe
from service.cli_client import show_event
from service.cli_console import columns, progress, size
from service.client import Client
from service.client_errors import failure
from service.deathsig import wrap

HERE = Path(__file__).resolve().parent
TASKS = ("supersense", "biblegenre", "icd", "langid")
RECIPES = {"TIES, full space": "ties.yaml", "TIES, Core Space": "ties-core.yaml"}
START_SECONDS = 60
TEXTS = 100
"""Texts of each task on which the accuracy is measured; a quick look, good to some four points."""


def main() -> int:
    """Run the demo and return the exit status."""
    options = parse()
    began = time.monotonic()
    shutil.rmtree(options.out, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="merganser-demo-") as data:
        with running_service(Path(data)) as url, Client(url) as client:
            print(f"Merganser runs at {url} (started in {time.monotonic() - began:.1f} s)")
            for task in TASKS:
                upload(client, task)
            rows = [merge(client, title, recipe, options.out) for title, recipe in RECIPES.items()]
        print(f"Everything is down again. {time.monotonic() - began:.1f} s in all.\n")
    print(columns(rows, ("METHOD", "SECONDS", "RANK", "SIZE", *(f"KEEPS {task}" for task in TASKS))))
    print("KEEPS: how much of an adapter's own update the merged one contains (1 = all of it).\n")
    print("The results:")
    folders = [options.out / Path(recipe).stem for recipe in RECIPES.values()]
    for folder in folders:
        print(f"  {folder}: {check(folder)}")
    if (options.quality / "base").is_dir() and installed("peft") and installed("transformers"):
        print_accuracy(options.quality, folders)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where the results go")
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="DIR",
        default=HERE.parents[1] / "shared" / "quality",
        help="a folder with the base model and the tasks, to measure accuracy (default: %(default)s)",
    )
    return parser.parse_args()


@contextmanager
def running_service(data: Path) -> Iterator[str]:
    """The URL of a service of our own; it is gone at the end, even if this process is killed."""
    log = data / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            wrap([sys.executable, "-m", "service", "up", "--port", "0", "--data", str(data)]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield wait_until_ready(process, data / "server.json")
    except BaseException:
        sys.stderr.write(log.read_text(encoding="utf-8", errors="replace"))
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], state: Path) -> str:
    """The URL that the service writes down once the API answers and a worker waits for work."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the service ended with status {process.returncode}")
        if state.is_file():
            url: str = json.loads(state.read_text(encoding="utf-8"))["url"]
            return url
        time.sleep(0.05)
    raise SystemExit(f"the service was not ready after {START_SECONDS} s")


def upload(client: Client, task: str) -> None:
    """Upload one example adapter as ``demo/<task>``."""
    revision = client.push_dir(HERE / "adapters" / task, f"demo/{task}")
    print(
        f"uploaded {revision['model']}: {revision['modules']} modules, rank {revision['rank']}, "
        f"{size(revision['size'])}, revision {revision['revision'][:12]}"
    )


def merge(client: Client, title: str, recipe_name: str, out: Path) -> tuple[object, ...]:
    """Run one of the example recipes in the service and download the result; a row of the table."""
    recipe = Recipe.load(HERE / "recipes" / recipe_name).model_dump(mode="json")
    for entry in recipe["models"]:
        entry["model"] = f"demo/{Path(entry['model']).name}"
    began = time.monotonic()
    merge_id = client.submit(recipe)["id"]
    with progress() as show:
        done = client.wait(merge_id, partial(show_event, show))
    if done["result"] is None:
        raise failure(done)
    seconds = time.monotonic() - began
    folder = out / Path(recipe_name).stem
    client.download_result(merge_id, folder)
    print(f"merged {merge_id} in {seconds:.1f} s, downloaded to {folder}")
    return table_row(title, seconds, folder)


def table_row(title: str, seconds: float, folder: Path) -> tuple[object, ...]:
    """Title, seconds, rank, size, and the retention per task, from the downloaded files."""
    summary = json.loads((folder / "report.json").read_text(encoding="utf-8"))["summary"]
    kept = {entry["model"].partition("@")[0]: entry["retention"] for entry in summary["inputs"]}
    weights = (folder / "adapter_model.safetensors").stat().st_size
    retention = (f"{kept[f'demo/{task}']:.2f}" for task in TASKS)
    return (title, f"{seconds:.1f}", summary["max_rank"], size(weights), *retention)


def check(folder: Path) -> str:
    """Read a result as its users would; what was read, in words."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = len(list(file.keys()))
    with open_adapter(folder) as adapter:
        norms = [float((B @ A).norm()) for B, A in map(adapter.factors, adapter.modules)]
    readers = f"{len(norms)} modules, {tensors} tensors, norm {sum(n * n for n in norms) ** 0.5:.2f}"
    if not installed("peft"):
        return readers
    from peft import PeftConfig
    from peft.utils.save_and_load import load_peft_weights

    PeftConfig.from_pretrained(str(folder))
    if len(load_peft_weights(str(folder), device="cpu")) != tensors:
        raise SystemExit(f"PEFT does not read all tensors of {folder}")
    return f"{readers}; PEFT reads it too"


def print_accuracy(quality: Path, folders: list[Path]) -> None:
    """Accuracy per task before and after, in the real base model; PEFT loads the adapters."""
    command = [sys.executable, "-W", "ignore", str(HERE / "accuracy.py"), str(quality), *map(str, folders)]
    command += ["--own", str(HERE / "adapters"), "--limit", str(TEXTS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(f"\nAccuracy on {TEXTS} held-out texts of each task:\n{done.stdout}", end="")


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    sys.exit(main())
