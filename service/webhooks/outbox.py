"""Messages that are still to be sent, in storage too, so that a lost Redis does not take them along."""

from __future__ import annotations

from collections.abc import Iterator

from service.bulk import documents
from service.storage import Storage
from service.webhooks.messages import Message

FOLDER = "webhook-outbox"


class Outbox:
    """The messages of all tenants. Every method takes the tenant first."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def put(self, tenant: str, endpoint_id: str, message: Message) -> None:
        """Keep a message until it is dropped."""
        document = {"endpoint": endpoint_id, "id": message.id, "kind": message.kind, "body": message.body}
        self._storage.put_json(_key(tenant, message.id), document)

    def drop(self, tenant: str, message_id: str) -> None:
        """Forget a message that was delivered or given up. Its absence is fine."""
        self._storage.delete(_key(tenant, message_id))

    def every(self, tenant: str) -> Iterator[tuple[str, Message]]:
        """The endpoint of each message, and the message."""
        keys = (key for key, _ in self._storage.keys(f"{FOLDER}/{tenant}"))
        for _, found in documents(self._storage, keys):
            yield found["endpoint"], Message(found["id"], found["kind"], found["body"])


def _key(tenant: str, message_id: str) -> str:
    return f"{FOLDER}/{tenant}/{message_id}.json"
