"""Files that are sent before the commit that names them: the batch API of Git LFS, basic and multipart.

Contents go straight into the tenant's blobs, checked by size and sha256. Large ones use the sessions of
:mod:`service.uploads`, so an interrupted client goes on where it was.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from merging.errors import MergeError
from service.bodies import drain
from service.deps import Services, ServicesDep, TenantDep
from service.errors import ServiceError
from service.gates import BODY_LIMIT
from service.hub.bodies import json_object, keep
from service.hub.errors import HubRoute
from service.hub.writing import base_url, writable
from service.problems import status_of
from service.routers.uploads import URL_SECONDS, SignedDep, action
from service.storage import blob_key

router = APIRouter(prefix="/hf", route_class=HubRoute, include_in_schema=False)

MEDIA_TYPE = "application/vnd.git-lfs+json"
BASIC_LIMIT = 16 << 20
"""Most bytes of an object that is sent in one piece by a client that could send it in parts."""
_MAX_OBJECTS = 1000
_UNLIMITED = 1 << 62
_OID = re.compile(r"^[0-9a-f]{64}$")


@router.post("/{ns}/{name}.git/info/lfs/objects/batch", max_body_size=BODY_LIMIT)
async def hub_lfs_batch(
    request: Request, services: ServicesDep, tenant: TenantDep, ns: str, name: str
) -> JSONResponse:
    """Where each object is to be sent; nowhere, if its content is there."""
    await run_in_threadpool(writable, services, tenant, ns, name)
    body = await json_object(request)
    objects = body.get("objects")
    if body.get("operation") != "upload" or body.get("hash_algo", "sha256") != "sha256":
        raise ServiceError("not_supported", "objects named by their sha256 can be uploaded, nothing else")
    if not isinstance(objects, list) or len(objects) > _MAX_OBJECTS:
        raise ServiceError("request_invalid", f"the body needs a list of up to {_MAX_OBJECTS} objects")
    offered = body.get("transfers") or ["basic"]
    parts = isinstance(offered, list) and "multipart" in offered
    rows = [await run_in_threadpool(_row, request, services, tenant, item, parts) for item in objects]
    return JSONResponse(
        {"transfer": "multipart" if parts else "basic", "objects": rows}, media_type=MEDIA_TYPE
    )


def _row(request: Request, services: Services, tenant: str, item: Any, parts: bool) -> dict[str, Any]:
    oid, size = (item.get("oid"), item.get("size")) if isinstance(item, dict) else (None, None)
    if not isinstance(oid, str) or not _OID.fullmatch(oid) or type(size) is not int or size < 0:
        raise ServiceError("request_invalid", "an object needs an oid (its sha256) and a size")
    row: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if services.storage.size(blob_key(tenant, oid)) == size:
        return row
    try:
        if parts and size > BASIC_LIMIT:
            upload, _ = services.uploads.open(tenant, size=size, sha256=oid)
            return {**row, "actions": {"upload": action(request, services, upload)}}
        limit = services.settings.max_upload_bytes
        if size > limit:
            raise ServiceError("file_too_large", f"the object has more than {limit} bytes")
    except MergeError as error:
        return {**row, "error": {"code": status_of(error), "message": f"{error.code}: {error.message}"}}
    path = f"/hf/lfs/{oid}/{size}"
    signed = services.signer.query("PUT", path, tenant, seconds=URL_SECONDS)
    href = f"{base_url(request, services)}/lfs/{oid}/{size}?{signed}"
    return {**row, "actions": {"upload": {"href": href, "expires_in": URL_SECONDS}}}


@router.put("/lfs/{oid}/{size}", max_body_size=_UNLIMITED)
async def hub_lfs_put(
    request: Request,
    services: ServicesDep,
    tenant: SignedDep,
    oid: Annotated[str, Path(pattern=_OID.pattern)],
    size: Annotated[int, Path(ge=0)],
) -> Response:
    """Send an object in one piece. The URL says what it must be and is all that is needed."""
    try:
        limit = min(size, services.settings.max_upload_bytes)
        await keep(
            services,
            tenant,
            request.stream(),
            limit=limit,
            announced=limit,
            expect=oid,
            name=f"the object {oid}",
        )
    except MergeError:
        await drain(request)
        raise
    return Response(headers={"ETag": f'"{oid}"'})
