"""Counts for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service import sizes, tally, telemetry
from service.broker import PRIORITIES, QUEUES, SIZES, queue_name
from service.deps import AdminDep, Services, ServicesDep
from service.exposition import MEDIA_TYPE, Exposition
from service.telemetry import RequestCounts

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response)
def metrics(request: Request, services: ServicesDep, _tenant: AdminDep) -> Response:
    """Queues, merges by method and end, requests of this process. No number tells one tenant from another."""
    page = Exposition()
    _queues(page, services)
    _merges(page, services)
    _requests(page, request.app.state.counts)
    page.family("merganser_event_streams", "gauge", "Open event streams of this process.")
    page.sample("merganser_event_streams", services.fanout.listening)
    return Response(str(page), media_type=MEDIA_TYPE)


def _queues(page: Exposition, services: Services) -> None:
    page.family("merganser_queue_depth", "gauge", "Jobs that wait: merges, files of split ones, pushes.")
    for priority in PRIORITIES:
        for size in SIZES:
            depth = services.redis.llen(f"rq:queue:{queue_name(priority, size)}")
            page.sample("merganser_queue_depth", depth, priority=priority, memory=size)
    page.family("merganser_merges_running", "gauge", "Jobs in the hands of workers.")
    page.sample("merganser_merges_running", sum(services.redis.zcard(f"rq:wip:{name}") for name in QUEUES))
    page.family("merganser_workers", "gauge", "Workers that were heard of lately.")
    page.sample("merganser_workers", sizes.workers(services.redis))


def _merges(page: Exposition, services: Services) -> None:
    counts = tally.read(services.redis)

    def rows(kind: str) -> list[tuple[tuple[str, ...], float]]:
        return [(name[1:], value) for name, value in counts.items() if name[0] == kind]

    page.family("merganser_merges_total", "counter", "Merges that ended.")
    for (method, state), value in rows("ended"):
        page.sample("merganser_merges_total", value, method=method, state=state)
    page.family("merganser_merge_failures_total", "counter", "Failed merges by the code of their problem.")
    for (code,), value in rows("failed"):
        page.sample("merganser_merge_failures_total", value, code=code)
    page.family("merganser_merges_reused_total", "counter", "Merges answered with a result that was there.")
    for (method,), value in rows("reused"):
        page.sample("merganser_merges_reused_total", value, method=method)
    page.family("merganser_merge_seconds", "histogram", "Time from start to end of successful merges.")
    for (method,), total in rows("seconds"):
        buckets = {int(index): value for (owner, index), value in rows("bucket") if owner == method}
        page.histogram("merganser_merge_seconds", tally.BUCKETS, buckets, total, method=method)


def _requests(page: Exposition, counts: RequestCounts) -> None:
    page.family("merganser_http_requests_total", "counter", "Answered requests of this process.")
    for (method, path, status), number in sorted(counts.requests.copy().items()):
        page.sample("merganser_http_requests_total", number, method=method, path=path, status=status)
    page.family("merganser_http_request_seconds", "histogram", "Time to answer, streams included.")
    buckets = counts.buckets.copy()
    for path, total in sorted(counts.seconds.copy().items()):
        own = {index: number for (owner, index), number in buckets.items() if owner == path}
        page.histogram("merganser_http_request_seconds", telemetry.BUCKETS, own, total, path=path)
    for name, number in (("received", counts.received), ("sent", counts.sent)):
        page.family(f"merganser_http_{name}_bytes_total", "counter", f"Bytes of bodies {name}.")
        page.sample(f"merganser_http_{name}_bytes_total", number)
