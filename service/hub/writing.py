"""The routes of the Hub that clients use to write, below ``/hf``: repositories and commits."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

import yaml
from fastapi import APIRouter, Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from merging.errors import MergeError
from merging.formats.sniff import refuse_foreign
from service.bodies import drain
from service.deps import Services, ServicesDep, TenantDep
from service.documents import FileEntry, Manifest
from service.errors import Conflict, Forbidden, ServiceError, TooLarge
from service.gates import BODY_LIMIT, COMMIT_LIMIT
from service.hub import policy
from service.hub.bodies import json_object, keep
from service.hub.changes import Change, not_uploaded
from service.hub.errors import HubRoute, Missing, Outdated
from service.hub.ndjson import CommitBody
from service.hub.repos import MAIN, find
from service.names import RESULTS, Reference, check_model, check_path, size_limit
from service.problems import document
from service.storage import Blob, blob_key
from service.uploaded import uploaded

router = APIRouter(prefix="/hf", route_class=HubRoute, include_in_schema=False)

Rev = Annotated[str, Path(max_length=255)]
_TRIES = 20
_MAX_FRONT_MATTER = 64 << 10


@router.post("/api/repos/create", max_body_size=BODY_LIMIT)
async def hub_create(request: Request, services: ServicesDep, tenant: TenantDep) -> JSONResponse:
    """Make an empty repository. One that exists is a conflict, with its address, as clients expect."""
    ns, name = _named(await json_object(request), tenant)
    model = check_model(ns, name)
    address = {"url": _address(request, services, model), "name": model, "id": model}
    made = await run_in_threadpool(services.registry.revise, tenant, model, None, ())
    if made is None:
        told = f"You already created this model repo: {model}"
        return JSONResponse({**document(409, "repo_exists", told), "error": told, **address}, 409)
    return JSONResponse(address)


@router.delete("/api/repos/delete", max_body_size=BODY_LIMIT)
async def hub_delete(request: Request, services: ServicesDep, tenant: TenantDep) -> dict[str, Any]:
    """Remove a repository with all of its commits."""
    ns, name = _named(await json_object(request), tenant)
    await run_in_threadpool(writable, services, tenant, ns, name)
    await run_in_threadpool(services.registry.delete, tenant, Reference(ns, name))
    return {}


@router.post("/api/validate-yaml", max_body_size=BODY_LIMIT)
async def hub_validate(request: Request) -> JSONResponse:
    """Whether the front matter of a model card is YAML. Clients ask without a key."""
    content = (await json_object(request)).get("content")
    content = content if isinstance(content, str) else ""
    problem = await run_in_threadpool(_front_matter_problem, content)
    if problem is None:
        return JSONResponse({"errors": [], "warnings": []})
    return JSONResponse({"errors": [{"message": problem}], "warnings": []}, 400)


@router.post("/api/models/{ns}/{name}/preupload/{revision}", max_body_size=BODY_LIMIT)
async def hub_preupload(
    request: Request, services: ServicesDep, tenant: TenantDep, ns: str, name: str, revision: Rev
) -> dict[str, Any]:
    """How each file of a commit is to be sent: in the commit itself, or before it as an LFS object."""
    newest = await run_in_threadpool(writable, services, tenant, ns, name, revision)
    files = (await json_object(request)).get("files")
    if not isinstance(files, list):
        raise ServiceError("request_invalid", "the body has no list `files`")
    agent = request.headers.get("user-agent", "")
    budget = policy.Budget(agent)
    rows = [await run_in_threadpool(_advice, services, tenant, newest, item, budget) for item in files]
    return {"files": [{**row, "oid": None} for row in rows] if policy.before_one(agent) else rows}


@router.post("/api/models/{ns}/{name}/commit/{revision}", max_body_size=COMMIT_LIMIT)
async def hub_commit(
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    ns: str,
    name: str,
    revision: Rev,
    create_pr: Annotated[str | None, Query()] = None,
) -> dict[str, Any]:
    """Make one revision of the newest one and all changes of the body, or none at all."""
    change = Change()

    async def store(chunks: AsyncIterator[bytes]) -> Blob:
        return await keep(services, tenant, chunks, limit=policy.REGULAR_LIMIT)

    try:
        await run_in_threadpool(writable, services, tenant, ns, name, revision)
        if create_pr not in (None, "", "0"):
            raise _unsupported("pull requests")
        async for line in CommitBody(request.stream(), store).lines():
            change.take(line)
        made = await run_in_threadpool(_amend, services, tenant, Reference(ns, name), change)
    except MergeError:
        await drain(request)
        raise
    url = f"{_address(request, services, made.model)}/commit/{made.revision}"
    return {"success": True, "commitOid": made.revision, "commitUrl": url, "hookOutput": ""}


@router.post("/api/models/{ns}/{name}/branch/{revision}")
@router.post("/api/models/{ns}/{name}/tag/{revision}")
def hub_branch(services: ServicesDep, tenant: TenantDep, ns: str, name: str, revision: Rev) -> JSONResponse:
    """The one branch there is exists already; others cannot be made."""
    writable(services, tenant, ns, name)
    if revision != MAIN:
        raise _unsupported("branches and tags")
    told = "Reference already exists"
    return JSONResponse({**document(409, "branch_exists", told), "error": told}, 409)


def base_url(request: Request, services: Services) -> str:
    """The address of the Hub as the client knows it."""
    public = services.settings.public_url
    return f"{public or str(request.base_url).rstrip('/')}/hf"


def _address(request: Request, services: Services, model: str) -> str:
    if policy.before_one(request.headers.get("user-agent", "")):
        return f"hf://{model}"
    return f"{base_url(request, services)}/{model}"


def _named(body: dict[str, Any], tenant: str) -> tuple[str, str]:
    """The namespace (by default the tenant, as on the Hub) and the name of a repository."""
    kind = body.get("type") or "model"
    if kind != "model":
        raise ServiceError(
            "repo_type_not_supported", f"there are no repositories of the type {str(kind)[:40]!r}"
        )
    return str(body.get("organization") or tenant), str(body.get("name") or "")


def writable(services: Services, tenant: str, ns: str, name: str, revision: str = MAIN) -> Manifest:
    """The newest revision of a repository that takes commits.

    Raises :class:`Missing`, ``result_read_only``.
    """
    repo = find(services, tenant, ns, name)
    if ns == RESULTS:
        raise Forbidden("result_read_only", "the result of a merge cannot be changed")
    if revision not in (MAIN, repo.commit):
        raise Missing(
            "RevisionNotFound",
            "revision_not_found",
            f"commits go to {MAIN}; there is no branch {revision[:80]!r}",
        )
    return services.registry.manifest(tenant, Reference(ns, name))


def _advice(
    services: Services, tenant: str, newest: Manifest, item: Any, budget: policy.Budget
) -> dict[str, Any]:
    try:
        path, size = item["path"], item["size"]
        if not isinstance(path, str) or type(size) is not int or size < 0:
            raise ValueError
        sample = base64.b64decode(item.get("sample") or "", validate=True)
    except (TypeError, KeyError, ValueError) as error:
        raise ServiceError("request_invalid", "a file needs a path, a size and a base64 sample") from error
    if policy.ignored(path):
        return {"path": path, "uploadMode": "regular", "shouldIgnore": True, "oid": None}
    check_path(path)
    refuse_foreign(sample, path)
    limit = size_limit(path, services.settings.max_upload_bytes)
    if size > limit:
        raise TooLarge("file_too_large", f"{path} has more than {limit} bytes", where={"file": path})
    mode = budget.mode(size)
    known = newest.file(path)
    oid = None
    if known is not None and known.size == size:  # else it differs anyway
        oid = known.sha256 if mode == "lfs" else git_oid(services, tenant, known)
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def git_oid(services: Services, tenant: str, entry: FileEntry) -> str | None:
    """The git object id of a file: clients compare it with theirs and send only what has changed."""
    digest = hashlib.sha1(f"blob {entry.size}\0".encode(), usedforsecurity=False)
    try:
        for chunk in services.storage.chunks(blob_key(tenant, entry.sha256)):
            digest.update(chunk)
    except FileNotFoundError:  # to be sent again
        return None
    return digest.hexdigest()


def _amend(services: Services, tenant: str, reference: Reference, change: Change) -> Manifest:
    """Apply a change to the newest revision; once more when another commit came first."""

    def find_content(path: str, sha256: str) -> FileEntry:
        found = uploaded(services.storage, tenant, path, sha256, services.settings.max_upload_bytes)
        if found is None:
            raise not_uploaded(path, sha256)
        return found

    for _ in range(_TRIES):
        newest = services.registry.manifest(tenant, reference)
        if change.parent not in (None, newest.revision):
            raise Outdated(
                "parent_commit_outdated",
                f"A commit has happened since {change.parent}: the newest is {newest.revision}",
                remedy="Look at it and commit again",
            )
        files = change.apply(newest.files, find_content)
        if files == newest.files:
            return newest
        made = services.registry.revise(tenant, newest.model, newest.revision, files)
        if made is not None:
            return made
    raise Conflict("commit_conflict", "other commits keep coming first", remedy="Try again")


def _front_matter_problem(content: str) -> str | None:
    lines = content.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return "the front matter is not closed with ---"
    text = "\n".join(lines[1:end])
    if len(text) > _MAX_FRONT_MATTER:
        return f"the front matter has more than {_MAX_FRONT_MATTER} characters"
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)  # building it would resolve merges, which can grow
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return f"the front matter is not YAML: {' '.join(str(error).split())[:300]}"
    return None if root is None or isinstance(root, yaml.MappingNode) else "the front matter is not a mapping"


def _unsupported(what: str) -> ServiceError:
    return ServiceError("not_supported", f"this service has no {what}", remedy=f"Commit to the branch {MAIN}")
