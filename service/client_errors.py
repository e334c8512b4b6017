"""What a client raises: the problems that the service tells, and that it cannot be reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from merging.errors import InputError, MergeError, MergeFailure


class Unreachable(MergeFailure):
    """The service cannot be reached, or says that it cannot answer at the moment."""


def failure(merge: Mapping[str, Any]) -> MergeError:
    """The error that a merge without a result stands for."""
    problem = merge.get("error")
    if problem:
        return error_of(problem, int(problem["status"]))
    return MergeFailure("merge_not_succeeded", f"the merge {merge['id']} is {merge['state']}")


def problem_of(response: httpx.Response) -> MergeError:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or "code" not in body:
        return MergeFailure("http_error", f"the service answered {response.status_code}")
    return error_of(body, response.status_code)


def error_of(problem: Mapping[str, Any], status: int) -> MergeError:
    where = {}
    for item in problem.get("errors") or []:
        where = {key: str(item[key]) for key in ("file", "module", "model") if item.get(key)}
        break
    kind: type[MergeError] = InputError if status < 500 else MergeFailure
    if status == 503:
        kind = Unreachable
    return kind(problem["code"], problem["detail"], remedy=problem.get("remedy"), where=where)


def unreachable(http: httpx.Client, error: Exception) -> MergeFailure:
    return Unreachable(
        "service_unreachable",
        f"the service at {http.base_url} cannot be reached: {error}",
        remedy="Start it with `merganser up`, or give its address with --url",
    )
