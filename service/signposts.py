"""What the API's description says beside the shape of each call: where to go on from it, and examples."""

from __future__ import annotations

from typing import Any

_MODEL = {"ns": "$request.path.ns", "name": "$request.path.name"}
_REVISION = {**_MODEL, "revision": "$response.body#/revision"}
_MERGE = {"merge_id": "$response.body#/id"}
_SAME_MERGE = {"merge_id": "$request.path.merge_id"}
_NEW_MERGE: dict[str, dict[str, str]] = {
    "get_merge": _MERGE,
    "merge_events": _MERGE,
    "cancel_merge": _MERGE,
    "retry_merge": _MERGE,
    "delete_merge": _MERGE,
    "get_report": _MERGE,
    "list_result_files": _MERGE,
    "get_result_file": {**_MERGE, "path": "adapter_config.json"},
}

_WEBHOOK_CALLS = {
    name: {"webhook_id": "$response.body#/id"}
    for name in ("get_webhook", "delete_webhook", "enable_webhook", "ping_webhook", "list_deliveries")
}

_LINKS: dict[str, dict[str, dict[str, dict[str, str]]]] = {
    "put_file": {"201": {"commit": _MODEL}},
    "commit": {
        "201": {
            "get_model": _MODEL,
            "list_revisions": _MODEL,
            "get_revision": _REVISION,
            "delete_revision": _REVISION,
            "get_file": {**_MODEL, "path": "$response.body#/files/0/path"},
        }
    },
    "get_model": {"200": {"get_file": {**_MODEL, "path": "$response.body#/files/0/path"}}},
    "list_models": {"200": {"list_models": {"cursor": "$response.body#/next_cursor"}}},
    "create_merge": {"200": _NEW_MERGE, "202": _NEW_MERGE},
    "retry_merge": {"200": _NEW_MERGE, "202": _NEW_MERGE},
    "list_merges": {
        "200": {
            "get_merge": {"merge_id": "$response.body#/data/0/id"},
            "list_merges": {"cursor": "$response.body#/next_cursor"},
        }
    },
    "cancel_merge": {"200": {"get_merge": _SAME_MERGE, "retry_merge": _SAME_MERGE}},
    "list_result_files": {
        "200": {"get_result_file": {**_SAME_MERGE, "path": "$response.body#/0/path"}},
    },
    "create_upload": {
        code: {name: {"upload_id": "$response.body#/id"} for name in ("get_upload", "abort_upload")}
        for code in ("200", "201")
    },
    "create_webhook": {"201": _WEBHOOK_CALLS},
    "ping_webhook": {
        "202": {
            "retry_delivery": {
                "webhook_id": "$request.path.webhook_id",
                "delivery_id": "$response.body#/id",
            }
        }
    },
    "create_key": {"201": {"revoke_key": {"key_id": "$response.body#/id"}}},
    "list_methods": {"200": {"get_method": {"name": "$response.body#/0/name"}}},
}
"""Operation, status, operation that follows, its parameters."""

_PARAMETERS = {"ns": "acme", "name": "task-a", "path": "adapter_config.json"}
_METHOD = {"name": "ties"}
_RECIPE = {
    "merge_method": "ties",
    "models": [{"model": "acme/task-a"}, {"model": "acme/task-b"}],
    "parameters": {"density": 0.3},
}
_BODIES: dict[str, dict[str, Any]] = {
    "create_merge": _RECIPE,
    "plan_merge": _RECIPE,
    "create_upload": {
        "model": "acme/task-a",
        "path": "adapter_model.safetensors",
        "size": 1000,
        "sha256": "0" * 64,
    },
    "create_key": {"scopes": ["write"], "name": "ci"},
}


def add_links(operation: dict[str, Any]) -> None:
    """Say which operations can follow, and what they take from the answer (OpenAPI link objects)."""
    for status, following in _LINKS.get(operation["operationId"], {}).items():
        response = operation["responses"][status]
        response["links"] = {
            name: {"operationId": name, "parameters": parameters} for name, parameters in following.items()
        }


def add_examples(operation: dict[str, Any]) -> None:
    """Give names and bodies an example; the models of all of them are the same two."""
    name = operation["operationId"]
    known = _METHOD if name == "get_method" else _PARAMETERS
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path" and parameter["name"] in known:
            parameter["example"] = known[parameter["name"]]
    if name in _BODIES:
        operation["requestBody"]["content"]["application/json"]["example"] = _BODIES[name]
