"""What is to be delivered, and what came of it, in Redis: a process that dies leaves nothing undelivered.

A message is due at a time. Whoever claims it moves that time on by a lease; unless the outcome is noted
before the lease is over, somebody else sends it once more. So every message is delivered at least once, under
the same id.
"""

from __future__ import annotations

import json
import time
from typing import Any, Literal

import redis
from pydantic import BaseModel, ConfigDict, Field

from service.broker import text
from service.clock import at, now
from service.documents import MergeRecord
from service.errors import NotFound
from service.paging import page
from service.storage import Storage
from service.webhooks.endpoints import Endpoints
from service.webhooks.messages import Message, of_end
from service.webhooks.outbox import Outbox

DUE = "mg:webhooks:due"
"""Sorted set of ``tenant/endpoint/message`` by the time it is due, in ms."""
LEASE_MILLIS = 60_000
DELIVERY_ID_PATTERN = r"^msg_[0-9a-f]{32}$"
DeliveryState = Literal["pending", "delivered", "failed", "dropped"]

_KEPT_SECONDS = 30 * 24 * 3600
_KEPT_MESSAGES = 1000

# KEYS: message, log, due. ARGV: id, document, now, member, seconds, messages kept. Once for each id.
_ADD = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], 'doc', ARGV[2], 'state', 'pending', 'attempts', '[]', 'next', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1 - ARGV[6])
redis.call('EXPIRE', KEYS[2], ARGV[5])
redis.call('ZADD', KEYS[3], ARGV[3], ARGV[4])
return 1
"""
# KEYS: due. ARGV: now, end of the lease, how many.
_CLAIM = """
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
for _, member in ipairs(found) do redis.call('ZADD', KEYS[1], ARGV[2], member) end
return found
"""
# KEYS: message, due. ARGV: member, state, attempts, next ('' for never).
_NOTE = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[1], 'state', ARGV[2], 'attempts', ARGV[3], 'next', ARGV[4])
elseif ARGV[4] ~= '' then
  return redis.call('ZREM', KEYS[2], ARGV[1])
end
if ARGV[4] == '' then return redis.call('ZREM', KEYS[2], ARGV[1]) end
return redis.call('ZADD', KEYS[2], ARGV[4], ARGV[1])
"""


class Attempt(BaseModel):
    """One try to deliver a message."""

    model_config = ConfigDict(extra="forbid")

    at: str
    seconds: float
    status: int | None = Field(description="of the answer, if there was one")
    error: str | None = Field(description="why it does not count as delivered")
    response: str | None = Field(description="the beginning of the answer")


class Delivery(BaseModel):
    """A message and what came of it."""

    model_config = ConfigDict(extra="forbid")

    id: str
    webhook: str
    type: str
    created_at: str
    state: DeliveryState
    next_at: str | None = Field(description="while it is pending: when it is tried next")
    attempts: list[Attempt]
    body: str = Field(description="what is sent")


class Deliveries:
    """The messages of all tenants. Every method that takes a tenant takes it first."""

    def __init__(self, connection: redis.Redis) -> None:
        self._redis = connection
        self._add = connection.register_script(_ADD)
        self._claim = connection.register_script(_CLAIM)
        self._note = connection.register_script(_NOTE)

    def add(self, tenant: str, endpoint_id: str, message: Message) -> bool:
        """Let a message be sent; whether it is a new one."""
        moment = _millis()
        document = {
            "id": message.id,
            "webhook": endpoint_id,
            "type": message.kind,
            "created_at": now(),
            "body": message.body,
        }
        keys = [_message_key(tenant, message.id), _log_key(tenant, endpoint_id), DUE]
        member = f"{tenant}/{endpoint_id}/{message.id}"
        arguments: list[str | int] = [
            message.id,
            json.dumps(document),
            moment,
            member,
            _KEPT_SECONDS,
            _KEPT_MESSAGES,
        ]
        return bool(self._add(keys=keys, args=arguments))

    def claim(self, count: int, *, moment: int | None = None) -> list[tuple[str, str, str]]:
        """(tenant, endpoint, message) of some that are due, which nobody else gets for the lease."""
        start = _millis() if moment is None else moment
        found = self._claim(keys=[DUE], args=[start, start + LEASE_MILLIS, count])
        parts = [text(member).split("/") for member in found]
        return [(tenant, endpoint, message) for tenant, endpoint, message in parts]

    def note(
        self, tenant: str, delivery: Delivery, state: DeliveryState, *, next_millis: int | None = None
    ) -> None:
        """Write down what came of a message; ``next_millis``: when a pending one is tried again."""
        attempts = json.dumps([attempt.model_dump(mode="json") for attempt in delivery.attempts])
        member = f"{tenant}/{delivery.webhook}/{delivery.id}"
        due = "" if next_millis is None else next_millis
        self._note(keys=[_message_key(tenant, delivery.id), DUE], args=[member, state, attempts, due])

    def postpone(self, tenant: str, endpoint_id: str, message_id: str, *, seconds: float) -> None:
        """Send a message a little later."""
        due = _millis() + int(seconds * 1000)
        self._redis.zadd(DUE, {f"{tenant}/{endpoint_id}/{message_id}": due}, xx=True)

    def forget(self, tenant: str, endpoint_id: str, message_id: str) -> None:
        """Send a message no more that is not known any more."""
        self._redis.zrem(DUE, f"{tenant}/{endpoint_id}/{message_id}")

    def again(self, tenant: str, endpoint_id: str, message_id: str) -> Delivery:
        """Try a message once more, now. Raises ``delivery_not_found``."""
        found = self.get(tenant, endpoint_id, message_id)
        self.note(tenant, found, "pending", next_millis=_millis())
        return self.get(tenant, endpoint_id, message_id)

    def get(self, tenant: str, endpoint_id: str, message_id: str) -> Delivery:
        """A message. Raises ``delivery_not_found``."""
        found = self.find(tenant, message_id)
        if found is None or found.webhook != endpoint_id:
            raise NotFound("delivery_not_found", f"there is no delivery {message_id}")
        return found

    def find(self, tenant: str, message_id: str) -> Delivery | None:
        """A message, or None."""
        fields = self._redis.hgetall(_message_key(tenant, message_id))
        if not fields:
            return None
        found: dict[str, Any] = {text(key): text(value) for key, value in fields.items()}
        following = found["next"] if found["state"] == "pending" else ""
        return Delivery(
            **json.loads(found["doc"]),
            state=found["state"],
            next_at=at(int(following)) if following else None,
            attempts=json.loads(found["attempts"]),
        )

    def log(
        self, tenant: str, endpoint_id: str, *, limit: int, cursor: str | None
    ) -> tuple[list[Delivery], str | None]:
        """The messages to an endpoint, the newest first, and the next cursor. Old ones are forgotten."""
        ids, following = page(self._redis, _log_key(tenant, endpoint_id), limit=limit, cursor=cursor)
        return [found for item in ids if (found := self.find(tenant, item))], following

    def drop_all(self, tenant: str, endpoint_id: str) -> None:
        """Forget the log of an endpoint."""
        self._redis.delete(_log_key(tenant, endpoint_id))


def announce(connection: redis.Redis, storage: Storage, record: MergeRecord) -> None:
    """Let everyone be told who wants to hear of the end of a merge. Safe to repeat."""
    deliveries, outbox = Deliveries(connection), Outbox(storage)
    for endpoint in Endpoints(storage).concerned(record):
        message = of_end(record, endpoint)
        known = deliveries.find(record.tenant, message.id)
        if known is None or known.state == "pending":
            outbox.put(record.tenant, endpoint.id, message)
            deliveries.add(record.tenant, endpoint.id, message)


def _millis() -> int:
    return int(time.time() * 1000)


def _message_key(tenant: str, message_id: str) -> str:
    return f"mg:{tenant}:delivery:{message_id}"


def _log_key(tenant: str, endpoint_id: str) -> str:
    return f"mg:{tenant}:webhook:{endpoint_id}:deliveries"
