"""Requests made up from openapi.yaml: whatever is sent, the answer is one that the description allows.

``make fuzz`` runs the same with many more requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest
from adapters import write_adapter

from service.auth import Keys
from service.client import Client
from service.storage import Storage
from tests.running import Up, push

CONFIG = Path(__file__).with_name("schemathesis.toml")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Requests of each operation and phase; 0: the few of the configuration."""

BRIEF = """
[[operations]]
include-operation-id = "plan_merge"
phases.coverage.enabled = false  # its bodies are those of create_merge, and the slowest to make up
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    limits = {"reads_per_minute": "0", "writes_per_minute": "0", "max_upload_bytes": str(8 << 20)}
    running = Up(tmp_path_factory.mktemp("fuzzed"), auth="keys", **limits)
    yield running
    assert running.stop() == 0, running.log()


@pytest.fixture(scope="module")
def variables(service: Up, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the configuration refers to: a key, and things of its tenant."""
    key, _ = Keys(Storage.open(service.storage.as_uri())).create("fuzz", ("admin",))
    folder = tmp_path_factory.mktemp("adapters")
    with Client(service.url, key=key) as client:
        models = [
            push(client, write_adapter(folder / name, seed=seed), f"acme/{name}")
            for seed, name in enumerate(("task-a", "task-b", "scrap"))
        ]
        recipe = {"merge_method": "linear", "models": [{"model": name} for name in models[:2]]}
        merge = client.wait(client.submit(recipe)["id"])
    return {"FUZZ_KEY": key, "FUZZ_MERGE": merge["id"], "FUZZ_REVISION": models[0].partition("@")[2]}


@pytest.mark.slow
def test_every_answer_is_one_that_the_description_allows(
    service: Up, variables: dict[str, str], tmp_path: Path
) -> None:
    config, report = tmp_path / "schemathesis.toml", tmp_path / "report.json"
    text = CONFIG.read_text() + ("" if EXAMPLES else BRIEF)
    config.write_text(Template(text).substitute(variables))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    options = ["--report-json-path", str(report), *(["--max-examples", str(EXAMPLES)] if EXAMPLES else [])]
    done = subprocess.run(
        [*command, f"{service.url}/openapi.json", *options],
        env={**os.environ, "NO_COLOR": "1"},
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=3600 if EXAMPLES else 240,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    found = json.loads(report.read_text())
    sys.stdout.write(f"{found['test_cases']}\n")
    assert found["operations"]["tested"] == found["operations"]["total"]
    assert {name: phase["status"] for name, phase in found["phases"].items()} == dict.fromkeys(
        ("examples", "coverage", "fuzzing", "stateful"), "success"
    )
    assert found["test_cases"]["generated"] > 500
