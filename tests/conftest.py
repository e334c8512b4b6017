"""Fixtures shared by the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# How long one example takes says more about the machine than about the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests where no CUDA device is present."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of reference outputs; it lies beside a checkout, not in it."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the golden reference data is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def quality_dir() -> Path:
    """The folder with the real base model, adapters and tasks."""
    folder = SHARED / "quality"
    if not folder.is_dir():
        pytest.skip("the quality data is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def examples_dir() -> Path:
    """The repository's own examples."""
    return ROOT / "examples"
