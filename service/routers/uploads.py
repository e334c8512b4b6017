"""Upload big files in parts that go on where they broke off."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials
from starlette.requests import ClientDisconnect

from merging.errors import MergeError
from service.bodies import drain
from service.content import promised_sha256
from service.deps import Services, ServicesDep, TenantDep, bearer, demand, principal
from service.errors import BadRequest, ServiceError
from service.gates import BODY_LIMIT
from service.schemas.uploads import CompleteRequest, ReceivedPart, UploadRequest, UploadSession
from service.upload_sessions import UPLOAD_ID_PATTERN, Upload, entry, part_key

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

UploadId = Annotated[str, Path(description="Id of the upload", pattern=UPLOAD_ID_PATTERN)]
URL_SECONDS = 3600
_UNLIMITED = 1 << 62


async def bearer_or_signature(
    request: Request,
    services: ServicesDep,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    tenant: Annotated[str | None, Query(max_length=63, description="Part of a signed URL")] = None,
    expires: Annotated[int | None, Query(ge=0, le=1 << 40, description="Part of a signed URL")] = None,
    signature: Annotated[str | None, Query(max_length=64, description="Part of a signed URL")] = None,
) -> str:
    """The tenant, by a signed URL or else by a key. Raises ``signature_*`` and the errors of keys."""
    if signature is None or tenant is None or expires is None:
        return demand(await principal(request, services, given), "write")
    check = services.signer.check
    await run_in_threadpool(check, request.method, request.url.path, tenant, expires, signature)
    request.state.tenant = tenant
    return tenant


SignedDep = Annotated[str, Depends(bearer_or_signature)]


@router.post("", status_code=status.HTTP_201_CREATED, max_body_size=BODY_LIMIT)
def create_upload(
    request: Request, response: Response, services: ServicesDep, tenant: TenantDep, body: UploadRequest
) -> UploadSession:
    """Announce a file of the next revision. The same announcement again goes on with what is there (200)."""
    upload, new = services.uploads.open(tenant, **body.model_dump())
    if not new:
        response.status_code = status.HTTP_200_OK
    response.headers["Location"] = f"{services.settings.public_url or ''}/v1/uploads/{upload.id}"
    return shown(request, services, upload)


@router.get("/{upload_id}")
def get_upload(
    request: Request, services: ServicesDep, tenant: TenantDep, upload_id: UploadId
) -> UploadSession:
    """Which parts are there, and fresh URLs."""
    return shown(request, services, services.uploads.get(tenant, upload_id))


@router.put(
    "/{upload_id}/parts/{number}",
    max_body_size=_UNLIMITED,  # a part has its size
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def put_part(
    request: Request,
    response: Response,
    services: ServicesDep,
    tenant: SignedDep,
    upload_id: UploadId,
    number: Annotated[int, Path(description="Number of the part, from 1", ge=1, le=100_000)],
    content_digest: Annotated[
        str | None, Header(description="`sha-256=:<base64>:`; a body that differs is refused")
    ] = None,
) -> ReceivedPart:
    """Send one part, in any order, several at once, again if need be. A signed URL needs no key."""
    try:
        upload = await run_in_threadpool(services.uploads.get, tenant, upload_id)
        expect = promised_sha256(content_digest)
        sha256 = await services.uploads.parts.put(upload, number, request.stream(), expect=expect)
    except ClientDisconnect as error:
        raise BadRequest("upload_interrupted", f"part {number} broke off") from error
    except MergeError:
        await drain(request)
        raise
    response.headers["ETag"] = f'"{sha256}"'
    return ReceivedPart(number=number, size=upload.length(number), sha256=sha256)


@router.post("/{upload_id}/complete", max_body_size=BODY_LIMIT)
async def complete_upload(
    request: Request,
    services: ServicesDep,
    tenant: SignedDep,
    upload_id: UploadId,
    body: CompleteRequest | None = None,
) -> UploadSession:
    """Join the parts, check size and sha256, and stage the file for the next revision. Again is fine."""
    upload = await run_in_threadpool(services.uploads.get, tenant, upload_id)
    if body is not None and body.oid not in (None, upload.sha256):
        raise ServiceError(
            "upload_digest_mismatch",
            f"the upload was announced with the sha256 {upload.sha256}",
            where={"field": "oid"},
        )
    done = await services.uploads.complete(upload)
    return await run_in_threadpool(shown, request, services, done)


@router.delete("/{upload_id}", status_code=status.HTTP_204_NO_CONTENT)
async def abort_upload(services: ServicesDep, tenant: TenantDep, upload_id: UploadId) -> None:
    """End an upload and drop its parts. A file that is staged already stays so."""
    await services.uploads.abort(await run_in_threadpool(services.uploads.get, tenant, upload_id))


def shown(request: Request, services: Services, upload: Upload) -> UploadSession:
    """The public form of a session."""
    received = frozenset(services.uploads.parts.received(upload))
    numbers = range(1, upload.count + 1)
    return UploadSession.model_validate(
        {
            **upload.model_dump(exclude={"tenant", "complete"}),
            "state": "complete" if upload.complete else "open",
            "parts": [{"number": n, "size": upload.length(n), "received": n in received} for n in numbers],
            "actions": None if upload.complete else {"upload": action(request, services, upload)},
            "file": entry(upload).model_dump() if upload.complete else None,
        }
    )


def action(request: Request, services: Services, upload: Upload) -> dict[str, object]:
    """Where the parts go and what completes them, as Git LFS multipart says it."""
    base = services.settings.public_url or str(request.base_url).rstrip("/")
    header = {"chunk_size": str(upload.part_size)}

    def signed(method: str, path: str) -> str:
        query = services.signer.query(method, path, upload.tenant, seconds=URL_SECONDS)
        return f"{base}{path}?{query}"

    for number in range(1, upload.count + 1):
        direct = None
        if services.settings.direct_uploads:
            direct = services.storage.presigned("PUT", part_key(upload, number), URL_SECONDS)
        path = f"/v1/uploads/{upload.id}/parts/{number}"
        header[f"{number:05d}"] = direct or signed("PUT", path)
    href = signed("POST", f"/v1/uploads/{upload.id}/complete")
    return {"href": href, "header": header, "expires_in": URL_SECONDS}
