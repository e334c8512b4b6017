"""Plan, request and read merges, and download their results."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query, Request, Response, status

from merging.errors import MergeError
from merging.recipe import Recipe
from service.content import send
from service.deps import Cursor, Limit, ReaderDep, Services, ServicesDep, TenantDep
from service.documents import MergeRecord, MergeState, result_key
from service.errors import Conflict, NotFound
from service.gates import BODY_LIMIT
from service.names import MERGE_ID_PATTERN
from service.registry import hide_folder
from service.schemas.merges import Merge, MergePage, MergeRequest, MergeSummary
from service.schemas.models import StoredFile
from service.scratch import scratch

router = APIRouter(prefix="/v1/merges", tags=["merges"])

MergeId = Annotated[str, Path(description="Id of the merge", pattern=MERGE_ID_PATTERN)]
RecipeBody = Annotated[dict[str, Any], Body(description="A recipe")]


@router.post("/plan", max_body_size=BODY_LIMIT)
def plan_merge(services: ServicesDep, tenant: ReaderDep, body: RecipeBody) -> dict[str, Any]:
    """Check a recipe and estimate the work, without a job. No tensor is read beyond the headers."""
    return _plan(services, tenant, MergeRequest.read(body).recipe())[1]


@router.post("", status_code=status.HTTP_202_ACCEPTED, max_body_size=BODY_LIMIT)
def create_merge(response: Response, services: ServicesDep, tenant: TenantDep, body: RecipeBody) -> Merge:
    """Queue a merge. The recipe is checked first, as `plan` does; its models are pinned to revisions."""
    asked = MergeRequest.read(body)
    recipe, _ = _plan(services, tenant, asked.recipe())
    record = services.jobs.create(tenant, recipe, name=asked.name)
    response.headers["Location"] = f"{services.settings.public_url or ''}/v1/merges/{record.id}"
    return Merge.of(record)


@router.get("")
def list_merges(
    services: ServicesDep,
    tenant: TenantDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[MergeState | None, Query(description="Only merges in this state")] = None,
) -> MergePage:
    """Merges, the newest first."""
    found, following = services.jobs.recent(tenant, limit=limit, cursor=cursor, state=state)
    return MergePage(data=[MergeSummary.of(item) for item in found], next_cursor=following)


@router.get("/{merge_id}")
def get_merge(services: ServicesDep, tenant: TenantDep, merge_id: MergeId) -> Merge:
    """The state of a merge and, at its end, its result or its error."""
    return Merge.of(services.jobs.get(tenant, merge_id))


@router.get("/{merge_id}/report")
def get_report(request: Request, services: ServicesDep, tenant: TenantDep, merge_id: MergeId) -> Response:
    """What the merge did: ranks, discarded energy, norms, retention per input, warnings, versions."""
    return _file(request, services, tenant, merge_id, "report.json")


@router.get("/{merge_id}/files")
def list_result_files(services: ServicesDep, tenant: TenantDep, merge_id: MergeId) -> list[StoredFile]:
    """The files of the result."""
    _, result = _succeeded(services, tenant, merge_id)
    return [StoredFile.model_validate(entry.model_dump()) for entry in result.files]


@router.get("/{merge_id}/files/{path:path}", response_class=Response)
@router.head("/{merge_id}/files/{path:path}", include_in_schema=False)
def get_result_file(
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    merge_id: MergeId,
    path: Annotated[str, Path(max_length=255)],
) -> Response:
    """Download a file of the result. Ranges and `If-None-Match` are honoured."""
    return _file(request, services, tenant, merge_id, path)


def _plan(services: Services, tenant: str, recipe: Recipe) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with pinned models, and its plan."""
    from merging import catalog, plan

    catalog.resolve(recipe)  # the cheap checks come before any file is touched
    pinned = services.sources.pin(tenant, recipe)
    with scratch(services.settings.scratch_dir) as folder:
        try:
            found = plan(pinned, resolve=services.sources.place(tenant, pinned, folder))
            return pinned, found.to_dict()
        except MergeError as error:
            raise hide_folder(error, folder) from None


def _file(request: Request, services: Services, tenant: str, merge_id: str, path: str) -> Response:
    record, result = _succeeded(services, tenant, merge_id)
    entry = next((item for item in result.files if item.path == path), None)
    if entry is None:
        raise NotFound("file_not_found", f"the result of {merge_id} has no file {path!r}")
    return send(request, services.storage, result_key(tenant, record.id, result.attempt, path), entry)


def _succeeded(services: Services, tenant: str, merge_id: str) -> tuple[MergeRecord, Any]:
    record = services.jobs.get(tenant, merge_id)
    if record.result is None:
        raise Conflict(
            "merge_not_succeeded",
            f"the merge {merge_id} has no result; its state is {record.state}",
            remedy="Wait for the state succeeded" if not record.ended else None,
        )
    return record, record.result
