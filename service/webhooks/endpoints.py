"""Who is told: endpoints that a tenant registered for all its merges, and that of a single merge."""

from __future__ import annotations

import secrets
from typing import Literal, get_args

from service.clock import now
from service.documents import Document, MergeRecord
from service.errors import Conflict, NotFound
from service.storage import Storage
from service.webhooks.sign import new_secret

EventType = Literal["merge.succeeded", "merge.failed", "merge.cancelled"]
EVENTS: tuple[EventType, ...] = get_args(EventType)
WEBHOOK_ID_PATTERN = r"^whk_[0-9a-f]{32}$"
MAX_ENDPOINTS = 20


class Endpoint(Document):
    """Where messages of a tenant go. Its secret has to be kept as it is, because it signs."""

    id: str
    tenant: str
    url: str
    secret: str | None = None
    """None: the secret of the tenant."""
    events: tuple[EventType, ...] = EVENTS
    description: str | None = None
    merge: str | None = None
    """The one merge that it is for."""
    created_at: str
    disabled_at: str | None = None
    disabled_because: str | None = None


class Endpoints:
    """The endpoints of all tenants, in storage. Every method takes the tenant first."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def create(
        self,
        tenant: str,
        url: str,
        *,
        secret: str | None = None,
        events: tuple[EventType, ...] = EVENTS,
        description: str | None = None,
    ) -> Endpoint:
        """Register an endpoint for all merges, with a secret of its own. Raises ``too_many_webhooks``."""
        if len(self.every(tenant)) >= MAX_ENDPOINTS:
            raise Conflict("too_many_webhooks", f"a tenant has at most {MAX_ENDPOINTS} webhooks")
        endpoint = Endpoint(
            id=f"whk_{secrets.token_hex(16)}",
            tenant=tenant,
            url=url,
            secret=secret or new_secret(),
            events=events,
            description=description,
            created_at=now(),
        )
        self.save(endpoint)
        return endpoint

    def attach(
        self,
        tenant: str,
        merge_id: str,
        url: str,
        *,
        secret: str | None = None,
        events: tuple[EventType, ...] = EVENTS,
    ) -> Endpoint:
        """Note the endpoint of one merge. Its id follows from that of the merge."""
        endpoint = Endpoint(
            id=of_merge(merge_id),
            tenant=tenant,
            url=url,
            secret=secret,
            events=events,
            merge=merge_id,
            created_at=now(),
        )
        self.save(endpoint)
        return endpoint

    def attach_like(self, tenant: str, old: str, new: str) -> None:
        """Give a merge the endpoint that another one has, if it has one."""
        found = self.find(tenant, of_merge(old))
        if found is not None:
            self.attach(tenant, new, found.url, secret=found.secret, events=found.events)

    def every(self, tenant: str) -> list[Endpoint]:
        """The registered ones, the oldest first."""
        documents = [self._storage.get_json(key) for key, _ in self._storage.keys(_folder(tenant, None))]
        found = [Endpoint.model_validate(data) for data in documents if data is not None]
        return sorted(found, key=lambda endpoint: (endpoint.created_at, endpoint.id))

    def concerned(self, record: MergeRecord) -> list[Endpoint]:
        """Those that want to hear of the end of a merge."""
        own = self.find(record.tenant, of_merge(record.id))
        wanted = f"merge.{record.state}"
        return [
            endpoint
            for endpoint in (*self.every(record.tenant), *([own] if own else []))
            if wanted in endpoint.events and endpoint.disabled_at is None
        ]

    def get(self, tenant: str, endpoint_id: str) -> Endpoint:
        """An endpoint of either kind. Raises ``webhook_not_found``."""
        found = self.find(tenant, endpoint_id)
        if found is None:
            raise NotFound("webhook_not_found", f"there is no webhook {endpoint_id}")
        return found

    def find(self, tenant: str, endpoint_id: str) -> Endpoint | None:
        """An endpoint of either kind, or None."""
        for merge in (None, endpoint_id):
            data = self._storage.get_json(f"{_folder(tenant, merge)}/{endpoint_id}.json")
            if data is not None:
                return Endpoint.model_validate(data)
        return None

    def disable(self, endpoint: Endpoint, reason: str) -> None:
        """Tell it nothing any more."""
        if self.find(endpoint.tenant, endpoint.id) is not None:
            self.save(endpoint.model_copy(update={"disabled_at": now(), "disabled_because": reason}))

    def enable(self, tenant: str, endpoint_id: str) -> Endpoint:
        """Tell it again of what ends from now on."""
        found = self.get(tenant, endpoint_id)
        endpoint = found.model_copy(update={"disabled_at": None, "disabled_because": None})
        self.save(endpoint)
        return endpoint

    def delete(self, tenant: str, endpoint_id: str) -> None:
        """Forget an endpoint; what was on its way to it is dropped. Its absence is fine."""
        keys = [f"{_folder(tenant, merge)}/{endpoint_id}.json" for merge in (None, endpoint_id)]
        self._storage.delete(*keys)

    def save(self, endpoint: Endpoint) -> None:
        """Write an endpoint."""
        folder = _folder(endpoint.tenant, endpoint.merge)
        self._storage.put_json(f"{folder}/{endpoint.id}.json", endpoint.model_dump(mode="json"))

    def secret_of(self, endpoint: Endpoint) -> str:
        """The secret that signs what an endpoint gets."""
        return endpoint.secret or self.tenant_secret(endpoint.tenant)

    def tenant_secret(self, tenant: str) -> str:
        """The secret for the webhooks of merges that brought none; made when it is first needed."""
        key = f"webhook-secrets/{tenant}.json"
        data = self._storage.get_json(key)
        if data is None:
            self._storage.put_json(key, {"secret": new_secret()})
            data = self._storage.get_json(key) or {}  # another process may have been faster
        return str(data["secret"])


def of_merge(merge_id: str) -> str:
    """The id of the endpoint of a merge."""
    return f"whk_{merge_id.removeprefix('mrg_')}"


def _folder(tenant: str, merge: str | None) -> str:
    return f"{'webhooks' if merge is None else 'webhooks-of-merges'}/{tenant}"
