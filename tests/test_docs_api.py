"""The shell commands of docs/api.md work as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.auth import Keys
from service.storage import Storage
from tests.running import Up

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
BLOCKS = re.findall(r"^```sh run\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="the commands use curl")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(tmp_path_factory.mktemp("documented"), auth="keys")
    yield running
    assert running.stop() == 0, running.log()


def run(service: Up, folder: Path, key: str, blocks: list[str]) -> subprocess.CompletedProcess[str]:
    """Run blocks in one shell, which stops at the first command that fails or is refused."""
    (folder / ".curlrc").write_text("silent\nshow-error\nfail-with-body\nmax-time = 60\nnoproxy = *\n")
    (folder / "examples").symlink_to(ROOT / "examples")
    lines = ["set -euo pipefail"]
    for number, block in enumerate(blocks, 1):
        lines += [f"echo '--- block {number}' >&2", block]
    return subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        env={"PATH": os.environ["PATH"], "CURL_HOME": str(folder), "URL": service.url, "KEY": key},
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_commands_run_in_their_order(service: Up, tmp_path: Path) -> None:
    key, _ = Keys(Storage.open(service.storage.as_uri())).create("docs", ("admin",))
    done = run(service, tmp_path, key, BLOCKS)
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout[-3000:]}"
    assert len(BLOCKS) >= 7
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 1000


def test_a_refused_command_would_be_noticed(service: Up, tmp_path: Path) -> None:
    done = run(service, tmp_path, "mk_nobody", BLOCKS)
    assert done.returncode != 0
    assert "--- block 2" in done.stderr
    assert "--- block 3" not in done.stderr
