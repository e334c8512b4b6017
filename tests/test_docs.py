"""The generated pages follow the catalogue, and the recipes in the examples and pages are valid."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from merging import catalog
from merging.mergekit.config import is_mergekit
from merging.mergekit.reader import parse as mergekit_config
from merging.recipe import ModelEntry, Output, Prepare, Recipe, parse_document

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def recipes_in(page: Path) -> list[str]:
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if "merge_method:" in block and "models:" in block]


def test_method_pages_match_the_catalogue() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "recipes").glob("*.yaml")))
def test_example_recipes_name_real_methods_and_adapters(path: Path) -> None:
    recipe = Recipe.load(path)
    catalog.resolve(recipe)
    for entry in recipe.models:
        assert (ROOT / entry.model / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if recipes_in(page)], ids=lambda page: str(page.name)
)
def test_recipes_in_the_pages_are_valid(page: Path) -> None:
    for text in recipes_in(page):
        document = parse_document(text, page.name)
        if is_mergekit(document):
            assert mergekit_config(document).method.name == document["merge_method"]
            continue
        resolved = catalog.resolve(Recipe.parse(text, name=page.name))
        assert resolved.method.name in catalog.names()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize(
    ("prefix", "model"),
    [("", Recipe), ("models[].", ModelEntry), ("prepare.", Prepare), ("output.", Output)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_key_of_a_recipe_has_a_row_in_the_page(prefix: str, model: type[BaseModel]) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    keys = [f"{prefix}{name}" for name in model.model_fields if name not in ("output", "prepare")]
    assert [key for key in keys if f"| `{key}` |" not in text] == []
