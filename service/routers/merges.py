"""Plan, request and read merges, and download their results."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query, Request, Response, status
from fastapi.concurrency import run_in_threadpool

from merging.errors import InputError, MergeError
from service import outlook
from service.content import send
from service.deps import Cursor, Limit, ReaderDep, Services, ServicesDep, TenantDep
from service.documents import MergeRecord, MergeState, result_key
from service.errors import Conflict, NotFound
from service.gates import BODY_LIMIT
from service.inspection import hide_folder
from service.names import MERGE_ID_PATTERN
from service.quota import Reservations
from service.records import new_id, new_record
from service.remote.imports import remote_models
from service.results import job_digest, reuse
from service.routers.literal import LiteralFirst
from service.schemas.merges import Merge, MergeOptions, MergePage, MergeSummary
from service.schemas.models import StoredFile
from service.scratch import scratch
from service.waiting import preferred_wait, until_end
from service.work import Configuration, Work

router = APIRouter(prefix="/v1/merges", tags=["merges"], route_class=LiteralFirst)

MergeId = Annotated[str, Path(description="Id of the merge", pattern=MERGE_ID_PATTERN)]
Prefer = Annotated[str | None, Header(description="`wait=N`: answer when it has ended, or after N seconds")]
RecipeBody = Annotated[dict[str, Any], Body(description="A recipe, or a mergekit configuration")]


@router.post("/plan", max_body_size=BODY_LIMIT)
def plan_merge(services: ServicesDep, tenant: ReaderDep, body: RecipeBody) -> dict[str, Any]:
    """Check a recipe and estimate the work, without a job. No tensor is read beyond the headers."""
    _, document = MergeOptions.split(body)
    _, found = _plan(services, tenant, services.sources.read(tenant, document))
    if found is None:
        raise InputError(
            "hub_model_not_here",
            "a recipe with models of other hubs cannot be planned before they are here",
            remedy="Request the merge, or plan it with `merganser plan` on your machine",
            where={"field": "models"},
        )
    return found


@router.post("", status_code=status.HTTP_202_ACCEPTED, max_body_size=BODY_LIMIT)
async def create_merge(
    request: Request,
    response: Response,
    services: ServicesDep,
    tenant: TenantDep,
    body: RecipeBody,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="The same request, sent again within a day, is answered with the same merge",
            pattern=r"^[\x21-\x7e]{1,255}$",
        ),
    ] = None,
    prefer: Prefer = None,
    cache_control: Annotated[
        str | None, Header(description="`no-cache` does the work even if it was done before")
    ] = None,
) -> Merge:
    """Queue a merge. The recipe is checked first, as `plan` does; its models are pinned to revisions.

    A job that was done before is answered at once with its result. With `Prefer: wait=N` the answer comes
    when the merge has ended, after N seconds (at most 60) at the latest.
    """
    fresh = "no-cache" in (cache_control or "")
    options, document = MergeOptions.split(body)
    asked = await run_in_threadpool(services.sources.read, tenant, document)

    async def work(merge_id: str) -> None:
        more = {"id": merge_id, "request_id": getattr(request.state, "request_id", None)}
        await run_in_threadpool(_create, services, tenant, asked, options, fresh=fresh, **more)

    async def done(merge_id: str) -> bool:
        return await run_in_threadpool(services.jobs.entered, tenant, merge_id)

    if idempotency_key is None:
        merge_id, replayed = new_id(), False
        await work(merge_id)
    else:
        merge_id, replayed = await services.idempotency.once(tenant, idempotency_key, body, work, done)
    if replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return await _accepted(response, services, tenant, merge_id, prefer)


@router.get("")
def list_merges(
    services: ServicesDep,
    tenant: TenantDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[MergeState | None, Query(description="Only merges in this state")] = None,
    method: Annotated[str | None, Query(max_length=100, description="Only merges by this method")] = None,
    name: Annotated[str | None, Query(max_length=200, description="Only merges of this name")] = None,
) -> MergePage:
    """Merges, the newest first. With filters a page may be short though there is a next one."""

    def matches(record: MergeRecord) -> bool:
        return method in (None, record.recipe["merge_method"]) and name in (None, record.name)

    found, following = services.jobs.recent(tenant, limit=limit, cursor=cursor, state=state, matches=matches)
    return MergePage(data=[MergeSummary.of(item) for item in found], next_cursor=following)


@router.get("/{merge_id}")
def get_merge(services: ServicesDep, tenant: TenantDep, merge_id: MergeId) -> Merge:
    """The state of a merge and, at its end, its result or its error."""
    return _shown(services, services.jobs.get(tenant, merge_id))


@router.delete("/{merge_id}", status_code=status.HTTP_204_NO_CONTENT)
def delete_merge(services: ServicesDep, tenant: TenantDep, merge_id: MergeId) -> None:
    """Remove an ended merge and its result."""
    services.jobs.delete(tenant, merge_id)


@router.post("/{merge_id}/cancel")
def cancel_merge(response: Response, services: ServicesDep, tenant: TenantDep, merge_id: MergeId) -> Merge:
    """Stop a merge. One that is queued has then ended; one that runs ends within some seconds (202)."""
    record = services.jobs.cancel(tenant, merge_id)
    response.status_code = status.HTTP_200_OK if record.ended else status.HTTP_202_ACCEPTED
    return _shown(services, record)


@router.post("/{merge_id}/retry", status_code=status.HTTP_202_ACCEPTED)
async def retry_merge(
    request: Request,
    response: Response,
    services: ServicesDep,
    tenant: TenantDep,
    merge_id: MergeId,
    prefer: Prefer = None,
) -> Merge:
    """Queue a merge that failed or was cancelled once more, as a new merge with the same pinned recipe."""
    more = {"request_id": getattr(request.state, "request_id", None)}
    room = Reservations(services.redis, services.settings.max_tenant_bytes)
    await run_in_threadpool(room.demand, tenant)
    record = await run_in_threadpool(services.jobs.repeat, tenant, merge_id, **more)
    return await _accepted(response, services, tenant, record.id, prefer)


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


@router.get("/{merge_id}/tasks/{task}/{path:path}", response_class=Response)
@router.head("/{merge_id}/tasks/{task}/{path:path}", include_in_schema=False)
def get_task_file(
    request: Request,
    services: ServicesDep,
    tenant: TenantDep,
    merge_id: MergeId,
    task: Annotated[str, Path(max_length=255, description="Folder of one output of a multi-output method")],
    path: Annotated[str, Path(max_length=255)],
) -> Response:
    """Download a file of one output: the same as `files/{task}/{path}`."""
    return _file(request, services, tenant, merge_id, f"{task}/{path}")


def _create(
    services: Services, tenant: str, asked: Work, options: MergeOptions, *, fresh: bool, **more: Any
) -> None:
    """Enter a merge: ended already, when its job was done before, or else queued."""
    room = Reservations(services.redis, services.settings.max_tenant_bytes)
    room.demand(tenant)
    push = options.push_to.resolved(services.hubs, tenant) if options.push_to else None
    webhook = options.webhook.checked(services.webhook_allowed) if options.webhook else None
    pinned, found = _plan(services, tenant, asked)
    if found is not None:  # what lies on other hubs is unknown, so such a job is never the same
        more.update(digest=job_digest(pinned), memory_bytes=int(found["estimate"]["memory_bytes"]))
        room.demand(tenant, int(found["estimate"]["output_bytes"]))
    record = new_record(tenant, pinned, name=options.name, priority=options.priority, push=push, **more)
    if webhook is not None:
        given = webhook.model_dump()
        services.webhooks.attach(tenant, record.id, **{**given, "events": tuple(given["events"])})
    if fresh or record.digest is None or reuse(services.jobs, services.storage, record) is None:
        services.jobs.submit(record)
    else:
        services.pushes.start_waiting(tenant, record.id)


async def _accepted(
    response: Response, services: Services, tenant: str, merge_id: str, prefer: str | None
) -> Merge:
    """The answer to a request for a merge: 200 if it has ended, by patience or by luck, else 202."""
    record = await run_in_threadpool(services.jobs.get, tenant, merge_id)
    seconds = preferred_wait(prefer)
    if seconds is not None:
        response.headers["Preference-Applied"] = f"wait={seconds}"
        if not record.ended:
            await until_end(services, tenant, merge_id, seconds)
            record = await run_in_threadpool(services.jobs.get, tenant, merge_id)
    response.status_code = status.HTTP_200_OK if record.ended else status.HTTP_202_ACCEPTED
    response.headers["Location"] = f"{services.settings.public_url or ''}/v1/merges/{merge_id}"
    return await run_in_threadpool(_shown, services, record)


def _shown(services: Services, record: MergeRecord) -> Merge:
    position = outlook.ahead(services.redis, record)
    obstacle = outlook.obstacle(services.redis, record)
    if obstacle is not None:
        return Merge.of(record.model_copy(update={"message": obstacle}), position)
    return Merge.of(record, position, outlook.eta(services.redis, record, position))


def _plan(services: Services, tenant: str, asked: Work) -> tuple[Work, dict[str, Any] | None]:
    """What is asked for with pinned models, and its plan, or None when some of them lie on other hubs."""
    from merging import catalog, plan

    pinned: Work
    if isinstance(asked, Configuration):
        pinned = services.sources.pin_configuration(tenant, asked)
    else:
        catalog.resolve(asked)  # the cheap checks come before any file is touched
        pinned = services.sources.pin(tenant, asked)
        if remote_models(pinned):
            return pinned, None
    source = pinned.document if isinstance(pinned, Configuration) else pinned
    with scratch(services.settings.scratch_dir) as folder:
        try:
            found = plan(source, resolve=services.sources.place(tenant, pinned, folder, outlines=True))
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
