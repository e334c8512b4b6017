"""The routes of the Hub that clients use to read, below ``/hf``."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from service.content import send
from service.deps import PrincipalDep, ReaderDep, ServicesDep, TenantDep
from service.errors import BadRequest
from service.gates import BODY_LIMIT
from service.hub.errors import HubRoute
from service.hub.repos import MAIN, Repo, file_row, find

router = APIRouter(prefix="/hf", route_class=HubRoute, include_in_schema=False)

Rev = Annotated[str, Path(max_length=255)]
FilePath = Annotated[str, Path(max_length=1024)]
_MAX_PATHS = 2000


@router.get("/api/whoami-v2")
def hub_whoami(found: PrincipalDep) -> dict[str, Any]:
    """Whose key it is: the tenant is the user."""
    role = "write" if found.may("write") else "read"
    return {
        "type": "user",
        "id": found.tenant,
        "name": found.tenant,
        "fullname": found.tenant,
        "orgs": [],
        "auth": {
            "type": "access_token",
            "accessToken": {"displayName": found.key_id or "none", "role": role},
        },
    }


@router.get("/api/models/{ns}/{name}")
def hub_model(
    services: ServicesDep, tenant: TenantDep, ns: str, name: str, blobs: bool = False
) -> dict[str, Any]:
    """The newest commit of a repository."""
    return _info(find(services, tenant, ns, name), blobs=blobs)


@router.get("/api/models/{ns}/{name}/revision/{revision}")
def hub_revision(
    services: ServicesDep, tenant: TenantDep, ns: str, name: str, revision: Rev, blobs: bool = False
) -> dict[str, Any]:
    """One commit of a repository."""
    return _info(find(services, tenant, ns, name, revision), blobs=blobs)


@router.get("/api/models/{ns}/{name}/tree/{revision}")
@router.get("/api/models/{ns}/{name}/tree/{revision}/{path:path}")
def hub_tree(
    services: ServicesDep,
    tenant: TenantDep,
    ns: str,
    name: str,
    revision: Rev,
    path: str = "",
    recursive: Annotated[bool, Query()] = False,
) -> list[dict[str, Any]]:
    """What lies in a folder. All of it is one page: a repository has few files."""
    return find(services, tenant, ns, name, revision).tree(path.strip("/"), recursive=recursive)


@router.post("/api/models/{ns}/{name}/paths-info/{revision}", max_body_size=BODY_LIMIT)
async def hub_paths_info(
    request: Request, services: ServicesDep, tenant: ReaderDep, ns: str, name: str, revision: Rev
) -> list[dict[str, Any]]:
    """What some paths are; those that lead nowhere are left out. The body is a form with `paths`."""
    repo = await run_in_threadpool(find, services, tenant, ns, name, revision)
    try:
        form = parse_qs((await request.body()).decode(), max_num_fields=_MAX_PATHS)
    except ValueError as error:  # not UTF-8, or too many fields
        raise BadRequest(
            "form_invalid", f"the body is not a form with up to {_MAX_PATHS} fields `paths`"
        ) from error
    return repo.look_up(form.get("paths", []))


@router.get("/api/models/{ns}/{name}/refs")
def hub_refs(services: ServicesDep, tenant: TenantDep, ns: str, name: str) -> dict[str, Any]:
    """The branches: there is one."""
    commit = find(services, tenant, ns, name).commit
    branch = {"name": MAIN, "ref": f"refs/heads/{MAIN}", "targetCommit": commit}
    return {"branches": [branch], "tags": [], "converts": [], "pullRequests": []}


@router.get("/{ns}/{name}/resolve/{revision}/{path:path}", response_class=Response)
@router.head("/{ns}/{name}/resolve/{revision}/{path:path}")
def hub_file(
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    ns: str,
    name: str,
    revision: Rev,
    path: FilePath,
) -> Response:
    """A file of a commit, and in the headers all that clients want to know of it before they load it."""
    repo = find(services, tenant, ns, name, revision)
    stored = repo.file(path)
    response = send(request, services.storage, stored.key, stored.entry)
    response.headers["X-Repo-Commit"] = repo.commit
    response.headers["X-Linked-Etag"] = f'"{stored.entry.sha256}"'
    response.headers["X-Linked-Size"] = str(stored.entry.size)
    return response


def _info(repo: Repo, *, blobs: bool) -> dict[str, Any]:
    siblings = []
    for stored in repo.files:
        sibling: dict[str, Any] = {"rfilename": stored.entry.path}
        if blobs:
            row = file_row(stored.entry)
            sibling |= {"size": row["size"], "blobId": row["oid"], "lfs": row["lfs"]}
        siblings.append(sibling)
    return {
        "_id": repo.commit[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": repo.commit,
        "createdAt": repo.created_at,
        "lastModified": repo.created_at,
        "private": True,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        **({"library_name": repo.library} if repo.library else {}),
        "tags": repo.tags,
        "siblings": siblings,
    }
