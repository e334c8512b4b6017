"""The API's description: ``python -m service.openapi`` writes ``openapi.yaml``, ``--check`` compares it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.content import MEDIA_TYPES, OTHER_TYPE
from service.problems import MEDIA_TYPE
from service.schemas.merges import ConfigurationRequest, MergeRequest
from service.schemas.problem import Problem
from service.signposts import add_examples, add_links

DESCRIPTION = (
    "Upload adapters, ask for a merge, follow it, download the result.\n\n"
    "Every error is a problem document (RFC 9457) with a stable `code`."
)
_REF = "#/components/schemas/{model}"
_RECIPE_OPERATIONS = ("create_merge", "plan_merge")


def customise(app: FastAPI) -> None:
    """Make ``app.openapi()`` say what the generator cannot know: problems, recipes, headers."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app)
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _describe(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        webhooks=app.webhooks.routes,
    )
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _, extra = models_json_schema(
        [
            (MergeRequest, "validation"),
            (ConfigurationRequest, "validation"),
            (Problem, "serialization"),
        ],
        ref_template=_REF,
    )
    schemas.update({name: schema for name, schema in extra["$defs"].items() if name not in schemas})
    failure = {
        "description": "A problem",
        "content": {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}}},
    }
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"].update({"4XX": failure, "5XX": failure})
            _amend(operation)
            add_links(operation)
            add_examples(operation)
    for path in document.get("webhooks", {}).values():
        for operation in path.values():
            operation["responses"] = {"2XX": {"description": "Received"}}
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    return document


def _amend(operation: dict[str, Any]) -> None:
    name, responses = operation["operationId"], operation["responses"]
    if name in _RECIPE_OPERATIONS:
        body = operation["requestBody"]["content"]["application/json"]
        body["schema"] = {
            "anyOf": [{"$ref": _REF.format(model=name)} for name in ("MergeRequest", "ConfigurationRequest")]
        }
    if any(parameter["name"] == "signature" for parameter in operation.get("parameters", [])):
        operation["security"] = [*operation.get("security", []), {}]  # a signed URL needs no key
    if name == "create_upload":
        responses["200"] = {**responses["201"], "description": "It was announced before and goes on"}
    if name in ("create_merge", "retry_merge"):
        text = {"schema": {"type": "string"}}
        responses["202"]["headers"] = {"Location": {"description": "The merge", **text}}
    if name in ("create_merge", "retry_merge", "cancel_merge"):
        accepted = responses.get("202") or responses["200"]
        responses["200"] = {**accepted, "description": "It has ended"}
        responses["202"] = {**accepted, "description": "It has not ended yet"}
    if name in ("get_file", "get_result_file", "get_task_file"):
        content: dict[str, Any] = {name: {"schema": {}} for name in sorted(set(MEDIA_TYPES.values()))}
        content[OTHER_TYPE] = {"schema": {"type": "string", "format": "binary"}}
        responses["200"] = {"description": "The file", "content": content}
        responses["206"] = {"description": "The range asked for", "content": content}
        responses["304"] = {"description": "Not modified"}


def dump() -> str:
    """The text of ``openapi.yaml``."""
    from service.app import create_app
    from service.settings import Settings

    app = create_app(Settings.model_construct())
    return yaml.safe_dump(app.openapi(), sort_keys=False, allow_unicode=True, width=110)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(prog="python -m service.openapi", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    parser.add_argument("--file", type=Path, default=Path(__file__).resolve().parents[1] / "openapi.yaml")
    options = parser.parse_args(arguments)
    text = dump()
    if not options.check:
        options.file.write_text(text, encoding="utf-8")
        return 0
    if options.file.is_file() and options.file.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"{options.file} is out of date; run: python -m service.openapi\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
