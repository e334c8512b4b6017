"""Push results to other hubs, at a later time than that of the merge."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, status

from service.deps import ServicesDep, TenantDep
from service.gates import BODY_LIMIT
from service.names import MERGE_ID_PATTERN
from service.schemas.merges import Merge, PushTo

router = APIRouter(prefix="/v1/merges", tags=["merges"])


@router.post("/{merge_id}/push", status_code=status.HTTP_202_ACCEPTED, max_body_size=BODY_LIMIT)
def push_result(
    services: ServicesDep,
    tenant: TenantDep,
    merge_id: Annotated[str, Path(description="Id of the merge", pattern=MERGE_ID_PATTERN)],
    body: Annotated[PushTo | None, Body(description="Where to; by default where it was to go before")] = None,
) -> Merge:
    """Push the result of a merge to another hub, or push it again after a failure."""
    services.jobs.get(tenant, merge_id)
    push = body.resolved(services.hubs, tenant) if body else None
    return Merge.of(services.pushes.ask(tenant, merge_id, push))
