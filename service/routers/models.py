"""Upload, commit, list, describe, download and delete models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from merging.errors import MergeError
from service.bodies import drain, sniffed
from service.content import promised_sha256, send
from service.deps import Cursor, Limit, Services, ServicesDep, TenantDep
from service.errors import BadRequest, NotFound, ServiceError, TooLarge
from service.gates import BODY_LIMIT
from service.names import REVISION_PATTERN, Reference, check_model, check_path, size_limit
from service.schemas.models import CommitRequest, Revision, RevisionPage, StoredFile
from service.storage import Blob, DigestMismatch, StreamTooLong, blob_key

router = APIRouter(prefix="/v1/models", tags=["models"])

Ns = Annotated[str, Path(description="Namespace", max_length=96)]
Name = Annotated[str, Path(description="Name of the model", max_length=96)]
FilePath = Annotated[str, Path(description="Path of a file inside the model", max_length=255)]
Rev = Annotated[str, Path(description="Revision", pattern=REVISION_PATTERN)]
_UNLIMITED = 1 << 62


@router.put(
    "/{ns}/{name}/files/{path:path}",
    status_code=status.HTTP_201_CREATED,
    max_body_size=_UNLIMITED,  # the limit is a setting; it is kept while the body streams
    openapi_extra={
        "requestBody": {
            "required": False,  # no body is an empty file
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def put_file(
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    ns: Ns,
    name: Name,
    path: FilePath,
    content_digest: Annotated[
        str | None, Header(description="`sha-256=:<base64>:`; a body that differs is refused")
    ] = None,
) -> StoredFile:
    """Stream one file of the next revision. The body is the file itself, of any size up to the limit."""
    try:
        model = check_model(ns, name)
        check_path(path)
        blob = await _receive(request, services, tenant, path, promised_sha256(content_digest))
    except MergeError:
        await drain(request)
        raise
    entry = await run_in_threadpool(services.registry.stage, tenant, model, path, blob)
    return StoredFile.model_validate(entry.model_dump())


async def _receive(request: Request, services: Services, tenant: str, path: str, expect: str | None) -> Blob:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise ServiceError(
            "content_encoding_not_accepted", f"the body has the content encoding {encoding[:40]!r}",
            remedy="Send the file as it is",
        )  # fmt: skip
    limit = size_limit(path, services.settings.max_upload_bytes)
    length = request.headers.get("content-length", "")
    try:
        if length.isdecimal() and int(length) > limit:
            raise StreamTooLong(limit)
        async with services.quota.grant(tenant, int(length) if length.isdecimal() else 0) as grant:
            chunks = grant.metered(sniffed(request.stream(), path))
            blob = await services.storage.put_stream(tenant, chunks, limit=limit, expect=expect)
            grant.kept = blob.size if blob.new else 0
            return blob
    except StreamTooLong as error:
        raise TooLarge(
            "file_too_large", f"{path} has more than {limit} bytes", where={"file": path}
        ) from error
    except DigestMismatch as error:
        raise ServiceError(
            "content_digest_mismatch",
            f"{path} arrived with the sha256 {error.actual}, not with that of Content-Digest",
            remedy="Send it again",
            where={"file": path},
        ) from error
    except ClientDisconnect as error:
        raise BadRequest("upload_interrupted", f"the upload of {path} broke off") from error


@router.post("/{ns}/{name}/commit", status_code=status.HTTP_201_CREATED, max_body_size=BODY_LIMIT)
def commit(
    services: ServicesDep, tenant: TenantDep, ns: Ns, name: Name, body: CommitRequest | None = None
) -> Revision:
    """Check what was uploaded and make it an immutable revision. The same content gives the same revision.

    With `files` it is made of exactly these, whatever else was uploaded meanwhile or left by an earlier try.
    """
    wanted = body.files if body else None
    return Revision.of(services.registry.commit(tenant, check_model(ns, name), wanted))


@router.get("")
def list_models(
    services: ServicesDep, tenant: TenantDep, limit: Limit = 50, cursor: Cursor = None
) -> RevisionPage:
    """The newest revision of every model."""
    found, following = services.registry.models(tenant, limit=limit, cursor=cursor)
    return RevisionPage(data=[Revision.of(item) for item in found], next_cursor=following)


@router.get("/{ns}/{name}")
def get_model(services: ServicesDep, tenant: TenantDep, ns: Ns, name: Name) -> Revision:
    """The newest revision of a model."""
    return Revision.of(services.registry.manifest(tenant, Reference(*_named(ns, name))))


@router.get("/{ns}/{name}/revisions")
def list_revisions(
    services: ServicesDep, tenant: TenantDep, ns: Ns, name: Name, limit: Limit = 50, cursor: Cursor = None
) -> RevisionPage:
    """The revisions of a model, the newest first."""
    model = "/".join(_named(ns, name))
    found, following = services.registry.revisions(tenant, model, limit=limit, cursor=cursor)
    return RevisionPage(data=[Revision.of(item) for item in found], next_cursor=following)


@router.get("/{ns}/{name}/revisions/{revision}")
def get_revision(services: ServicesDep, tenant: TenantDep, ns: Ns, name: Name, revision: Rev) -> Revision:
    """One revision."""
    return Revision.of(services.registry.manifest(tenant, Reference(*_named(ns, name), revision)))


@router.delete("/{ns}/{name}", status_code=status.HTTP_204_NO_CONTENT)
def delete_model(services: ServicesDep, tenant: TenantDep, ns: Ns, name: Name) -> None:
    """Remove a model with all of its revisions."""
    services.registry.delete(tenant, Reference(*_named(ns, name)))


@router.delete("/{ns}/{name}/revisions/{revision}", status_code=status.HTTP_204_NO_CONTENT)
def delete_revision(services: ServicesDep, tenant: TenantDep, ns: Ns, name: Name, revision: Rev) -> None:
    """Remove one revision."""
    services.registry.delete(tenant, Reference(*_named(ns, name), revision))


@router.get("/{ns}/{name}/files/{path:path}", response_class=Response)
@router.head("/{ns}/{name}/files/{path:path}", include_in_schema=False)
def get_file(
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    ns: Ns,
    name: Name,
    path: FilePath,
    revision: Annotated[str | None, Query(pattern=REVISION_PATTERN)] = None,
) -> Response:
    """Download a file of a revision, by default the newest. Ranges and `If-None-Match` are honoured."""
    manifest = services.registry.manifest(tenant, Reference(*_named(ns, name), revision))
    entry = manifest.file(path)
    if entry is None:
        raise NotFound(
            "file_not_found", f"{manifest.model} has no file {path[:255]!r}", where={"model": manifest.model}
        )
    response = send(request, services.storage, blob_key(tenant, entry.sha256), entry)
    response.headers["X-Merganser-Revision"] = manifest.revision
    return response


def _named(ns: str, name: str) -> tuple[str, str]:
    """The two names; an impossible one is a model that does not exist."""
    try:
        check_model(ns, name)
    except ServiceError as error:
        raise NotFound("model_not_found", f"there is no model {ns[:96]}/{name[:96]}") from error
    return ns, name
