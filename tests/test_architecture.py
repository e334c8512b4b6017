"""The arrows between the packages, and what must not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("merging", "service", "workers")

MAY_IMPORT: dict[str, set[str]] = {
    "merging": set(),
    "service": {"merging"},
    "workers": {"merging", "service"},
}
"""Which of our packages each package may import, besides itself."""

SERVICE_INTERNALS = ("service.app", "service.routers", "service.schemas", "service.ui")
"""What belongs to the HTTP side alone; only the entry that runs everything may start it."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(source: Path) -> Iterator[str]:
    """Absolute names of the modules a file imports anywhere in it, by statement or by name."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"), filename=str(source))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_along_the_arrows(package: str) -> None:
    allowed = {package} | MAY_IMPORT[package]
    against = [
        f"{source.relative_to(ROOT)} imports {module}"
        for source in sources(package)
        for module in imported_modules(source)
        if module.partition(".")[0] in set(PACKAGES) - allowed
    ]
    assert against == []


def test_merging_knows_no_http_redis_or_rq() -> None:
    foreign = {"fastapi", "starlette", "uvicorn", "redis", "rq", "httpx", "obstore", "rich"}
    against = [
        f"{source.relative_to(ROOT)} imports {module}"
        for source in sources("merging")
        for module in imported_modules(source)
        if module.partition(".")[0] in foreign
    ]
    assert against == []


def test_workers_do_not_reach_into_the_http_side() -> None:
    against = [
        f"{source.relative_to(ROOT)} imports {module}"
        for source in sources("workers")
        for module in imported_modules(source)
        if module.startswith(SERVICE_INTERNALS) and source.name != "up.py"
    ]
    assert against == []


LOADS_BASE_MODELS = Path("merging/calibration/base.py")
"""The one file that may import transformers, for the extra ``eval``."""


def test_packages_do_not_need_the_tools_of_development() -> None:
    foreign = {"pytest", "hypothesis", "peft", "transformers", "tests", "benchmarks", "examples"}
    against = [
        f"{source.relative_to(ROOT)} imports {module}"
        for package in PACKAGES
        for source in sources(package)
        for module in imported_modules(source)
        if module.partition(".")[0] in foreign
        and (source.relative_to(ROOT), module.partition(".")[0]) != (LOADS_BASE_MODELS, "transformers")
    ]
    assert against == []


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, text=True, timeout=60, cwd=ROOT
    )


WITHOUT_TORCH = {
    "the library": "import merging, merging.errors",
    "recipes": "import merging.recipe; merging.recipe.Recipe",
    "the catalogue": "import merging.catalog; merging.catalog.describe()",
    "planning": "import merging.planning",
    "reading an adapter's headers": (
        "from merging.formats.adapter import open_adapter;open_adapter('examples/adapters/icd').modules"
    ),
    "the command tree": "from service.cli import build; build().format_help()",
    "the API": (
        "from service.app import create_app; from service.settings import load_settings;"
        "create_app(load_settings())"
    ),
    "the worker parent": "import workers.worker, workers.supervisor",
    "everything in one command": "import workers.up",
}


@pytest.mark.parametrize("code", WITHOUT_TORCH.values(), ids=WITHOUT_TORCH.keys())
def test_torch_is_not_imported_by(code: str, tmp_path: Path) -> None:
    done = run_python(
        "-c",
        f"import sys, os; os.environ['MERGANSER_DATA_DIR'] = {str(tmp_path)!r}\n"
        f"{code}\n"
        "print('torch' in sys.modules)",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_help_imports_neither_torch_nor_a_server_nor_a_client() -> None:
    done = run_python("-X", "importtime", "-m", "service", "--help")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    heavy = {"torch", "fastapi", "uvicorn", "redis", "rq", "httpx", "pydantic", "rich", "obstore"}
    assert "service.cli" in imported
    assert imported & heavy == set()
