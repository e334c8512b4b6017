"""Send what is due, again and again with growing pauses, until it arrives or there is no hope left."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from merging import __version__
from service.broker import TRANSIENT
from service.clock import now
from service.errors import Unavailable
from service.logs import event
from service.webhooks.deliveries import Attempt, Deliveries, Delivery, DeliveryState
from service.webhooks.endpoints import Endpoint, Endpoints
from service.webhooks.guard import Allowed, Refused, resolve
from service.webhooks.outbox import Outbox
from service.webhooks.sign import headers

SCHEDULE = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0)
"""Seconds to wait after each attempt that failed; when they are used up, the endpoint is disabled."""
ATTEMPT_SECONDS = 10.0
_JITTER = 0.1
_AT_ONCE = 40
_AT_ONCE_EACH = 4
"""Messages on their way to one endpoint, so that one that does not answer keeps nobody else waiting."""
_POSTPONE_SECONDS = 2.0
_POLL_SECONDS = 0.5
_READ_BYTES = 64 << 10
_KEPT_CHARACTERS = 2048
_GONE = 410
_log = logging.getLogger("merganser.webhooks")


@dataclass(frozen=True)
class _Answer:
    status: int | None = None
    error: str | None = None
    response: str | None = None


class Deliverer:
    """The loop that sends. Any number of processes may run one."""

    def __init__(
        self,
        endpoints: Endpoints,
        deliveries: Deliveries,
        outbox: Outbox,
        allowed: Allowed,
        *,
        schedule: tuple[float, ...] = SCHEDULE,
        seconds: float = ATTEMPT_SECONDS,
        verify: ssl.SSLContext | bool = True,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._endpoints = endpoints
        self._deliveries = deliveries
        self._outbox = outbox
        self._allowed = allowed
        self._schedule = schedule
        self._seconds = seconds
        self._verify = verify
        self._chance = chance
        self._running: dict[asyncio.Task[None], str] = {}
        """Each with the endpoint that it sends to."""

    async def run(self, stop: asyncio.Event) -> None:
        """Send until ``stop``. What is then under way is sent again by whoever comes next."""
        # no connection is kept: one was checked for the host that it was opened for, and for no other
        limits = httpx.Limits(max_connections=_AT_ONCE, max_keepalive_connections=0)
        async with httpx.AsyncClient(
            verify=self._verify, trust_env=False, follow_redirects=False, timeout=self._seconds, limits=limits
        ) as http:
            try:
                while not stop.is_set():
                    await self._round(http)
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), _POLL_SECONDS)
            finally:
                for task in self._running:
                    task.cancel()
                await asyncio.gather(*self._running, return_exceptions=True)

    async def _round(self, http: httpx.AsyncClient) -> None:
        self._running = {task: name for task, name in self._running.items() if not task.done()}
        free = _AT_ONCE - len(self._running)
        if not free:
            return
        try:
            for item in await asyncio.to_thread(self._deliveries.claim, free):
                name = f"{item[0]}/{item[1]}"
                if list(self._running.values()).count(name) >= _AT_ONCE_EACH:
                    await asyncio.to_thread(self._deliveries.postpone, *item, seconds=_POSTPONE_SECONDS)
                else:
                    self._running[asyncio.create_task(self._deliver(http, *item))] = name
        except TRANSIENT:  # it is told where it is asked for; what was claimed comes again after the lease
            return

    async def _deliver(self, http: httpx.AsyncClient, tenant: str, endpoint_id: str, message_id: str) -> None:
        """One attempt. Whatever keeps its outcome from being noted makes it due again after the lease."""
        try:
            delivery = await asyncio.to_thread(self._deliveries.find, tenant, message_id)
            if delivery is None:
                await asyncio.to_thread(self._deliveries.forget, tenant, endpoint_id, message_id)
                return
            endpoint = await asyncio.to_thread(self._endpoints.find, tenant, endpoint_id)
            if endpoint is None or endpoint.disabled_at is not None:
                await asyncio.to_thread(self._end, tenant, delivery, "dropped")
                return
            secret = await asyncio.to_thread(self._endpoints.secret_of, endpoint)
            moment, started = now(), time.perf_counter()
            answer = await self._send(http, endpoint.url, secret, delivery)
            seconds = round(time.perf_counter() - started, 3)
            attempt = Attempt(at=moment, seconds=seconds, **vars(answer))
            delivery = delivery.model_copy(update={"attempts": [*delivery.attempts, attempt]})
            await asyncio.to_thread(self._conclude, endpoint, delivery)
        except (Unavailable, *TRANSIENT) as error:
            _log.warning("the outcome of %s could not be noted: %s", message_id, error)
        except Exception:
            _log.exception("unexpected error in the delivery of %s", message_id)

    def _conclude(self, endpoint: Endpoint, delivery: Delivery) -> None:
        tenant, last, count = endpoint.tenant, delivery.attempts[-1], len(delivery.attempts)
        event(
            _log,
            logging.INFO,
            f"webhook {endpoint.id}: {last.error or 'delivered'}",
            message_id=delivery.id,
            attempt=count,
            status=last.status,
        )
        if last.error is None:
            self._end(tenant, delivery, "delivered")
        elif last.status == _GONE or count > len(self._schedule):
            self._end(tenant, delivery, "failed")
            reason = (
                "it answered 410 Gone" if last.status == _GONE else f"{count} attempts failed: {last.error}"
            )
            self._endpoints.disable(endpoint, reason)
        else:
            pause = self._schedule[count - 1] * (1 + _JITTER * (2 * self._chance() - 1))
            due = int((time.time() + pause) * 1000)
            self._deliveries.note(tenant, delivery, "pending", next_millis=due)

    def _end(self, tenant: str, delivery: Delivery, state: DeliveryState) -> None:
        self._deliveries.note(tenant, delivery, state)
        self._outbox.drop(tenant, delivery.id)

    async def _send(self, http: httpx.AsyncClient, url: str, secret: str, delivery: Delivery) -> _Answer:
        """Send a message once, to the address that was checked."""
        body = delivery.body.encode()
        try:
            async with asyncio.timeout(self._seconds):
                place, address = await resolve(url, self._allowed)
                ip = f"[{address}]" if address.version == 6 else str(address)
                request = http.build_request(
                    "POST",
                    f"{place.scheme}://{ip}:{place.port}{place.target}",
                    content=body,
                    headers={
                        "Host": place.authority,
                        "Content-Type": "application/json",
                        "User-Agent": f"Merganser/{__version__}",
                        "Accept-Encoding": "identity",
                        **headers(secret, delivery.id, int(time.time()), body),
                    },
                    extensions={"sni_hostname": place.host},
                )
                response = await http.send(request, stream=True)
                try:
                    return _judge(response.status_code, await _beginning(response))
                finally:
                    await response.aclose()
        except Refused as error:
            return _Answer(error=f"{error.code}: {error.message}")
        except (TimeoutError, httpx.TimeoutException):
            return _Answer(error=f"no answer within {self._seconds:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
            return _Answer(error=f"the connection failed: {type(error).__name__}")


def _judge(status: int, response: str) -> _Answer:
    if 200 <= status < 300:
        return _Answer(status, None, response)
    told = "redirects are not followed" if 300 <= status < 400 else f"the answer was {status}"
    return _Answer(status, told, response)


async def _beginning(response: httpx.Response) -> str:
    """The first characters of the answer; of an endless one no more than a little is read."""
    found = b""
    async for chunk in response.aiter_raw():
        found += chunk
        if len(found) >= _READ_BYTES:
            break
    return found[: 4 * _KEPT_CHARACTERS].decode(errors="replace")[:_KEPT_CHARACTERS]
