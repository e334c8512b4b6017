"""Every hostile or broken adapter is refused with its own code, fast and in little memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from formats.build import write_adapter
from formats.hostile import Case, cases

from merging.errors import InputError
from merging.formats.adapter import open_adapter


def test_there_are_many_cases_with_unique_names() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names)) >= 40


def test_the_adapter_that_the_cases_spoil_is_good(tmp_path: Path) -> None:
    assert list(open_adapter(write_adapter(tmp_path / "a")).modules) == ["layers.0.q"]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_refused_with_its_code(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    case.build(folder)
    started = time.process_time()
    with pytest.raises(InputError) as caught:
        open_adapter(folder)
    seconds = time.process_time() - started
    assert caught.value.code == case.code
    assert seconds < 1.0
    assert len(caught.value.message) < 2_000
    assert caught.value.message.isprintable()
    assert caught.value.remedy
    assert caught.value.where["file"]


def test_an_error_names_the_adapter_among_many(tmp_path: Path) -> None:
    case = next(case for case in cases() if case.name == "rank_of_config_wrong")
    case.build(tmp_path / "adapter")
    with pytest.raises(InputError) as caught:
        open_adapter(tmp_path / "adapter", label="team/third@2")
    assert caught.value.message.startswith("team/third@2: adapter_model.safetensors: module layers.0.q ")
    assert caught.value.where["model"] == "team/third@2"


@pytest.mark.parametrize(
    "name",
    ["quarter_million_tensors", "megabytes_of_quotes", "megabytes_of_braces", "megabytes_of_metadata"],
)
def test_large_headers_do_not_blow_up_memory(name: str, tmp_path: Path) -> None:
    case = next(case for case in cases() if case.name == name)
    folder = tmp_path / "adapter"
    case.build(folder)
    program = (
        "import resource, sys\n"
        "from merging.formats.adapter import open_adapter\n"
        "from merging.errors import InputError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try:\n    open_adapter(sys.argv[1])\n"
        "except InputError:\n    print(peak() - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(run.stdout) < 150 * 1024  # KiB
