"""openapi.yaml says what the application does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from merging.mergekit.config import TOP_LEVEL
from service import openapi
from service.schemas.merges import MergeOptions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "openapi.yaml").read_text())
    return found


def test_the_file_is_up_to_date() -> None:
    assert openapi.main(["--check"]) == 0


def test_a_stale_file_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "openapi.yaml"
    stale.write_text("openapi: 3.1.0\n")
    assert openapi.main(["--check", "--file", str(stale)]) == 1
    assert "out of date" in capsys.readouterr().err
    assert openapi.main(["--file", str(stale)]) == 0
    assert openapi.main(["--check", "--file", str(stale)]) == 0


def test_every_operation_has_a_name_of_its_own_and_documents_its_problems(document: dict[str, Any]) -> None:
    operations = [item for path in document["paths"].values() for item in path.values()]
    names = [item["operationId"] for item in operations]
    assert len(names) == len(set(names))
    for operation in operations:
        assert operation["summary"]
        problem = operation["responses"]["4XX"]["content"]["application/problem+json"]
        assert problem["schema"] == {"$ref": "#/components/schemas/Problem"}


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    missing: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            reference = node.get("$ref")
            if isinstance(reference, str):
                target: Any = document
                for part in reference.removeprefix("#/").split("/"):
                    target = target.get(part) if isinstance(target, dict) else None
                if target is None:
                    missing.append(reference)
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(document)
    assert missing == []


def test_the_body_of_a_merge_is_a_recipe_or_a_configuration(document: dict[str, Any]) -> None:
    body = document["paths"]["/v1/merges"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = ("MergeRequest", "ConfigurationRequest")
    assert body == {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names]}
    schema, other = (document["components"]["schemas"][name] for name in names)
    assert set(other["properties"]) == {*TOP_LEVEL, *MergeOptions.model_fields}
    assert {"merge_method", "models", "parameters", "output", "seed", "name"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
