"""Run a script in a process of its own whose Hub is the service.

The address of the Hub is read when the client library is imported, hence the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.running import Up


def python(up: Up, home: Path, script: str, *arguments: str, path: str = "", **more: str) -> Any:
    """What a script prints last, as JSON. ``path``: where other versions of libraries lie."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": f"{up.url}/hf",
        "HF_HOME": str(home),
        "HF_TOKEN": "any",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": path,
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=False, env=environment, cwd=home, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
