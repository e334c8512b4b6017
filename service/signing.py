"""Signed URLs: whoever has one may do the one thing it names, for one tenant, for a while; no key is needed.

The secret is made by the service and lives in Redis, shared by all processes of the API. A Redis that lost
everything makes another one: the URLs handed out before are then refused, and clients ask for new ones.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import urlencode

import redis

from service.errors import Forbidden

SECRET_KEY = "mg:signing"
"""String: the secret that signs URLs."""

_VERSION = b"merganser-url-1"


class Signer:
    """Signs and checks. ``path`` is that of the URL as the service sees it, without a prefix of a proxy."""

    def __init__(self, connection: redis.Redis) -> None:
        self._redis = connection

    def query(self, method: str, path: str, tenant: str, *, seconds: int) -> str:
        """The query that makes a URL of ``path`` good for ``seconds``."""
        expires = int(time.time()) + seconds
        signature = self._signature(method, path, tenant, expires)
        return urlencode({"tenant": tenant, "expires": expires, "signature": signature})

    def check(self, method: str, path: str, tenant: str, expires: int, signature: str) -> None:
        """Raise ``signature_invalid`` or ``signature_expired`` unless the URL is good at the moment."""
        made = self._signature(method, path, tenant, expires)
        if not hmac.compare_digest(made.encode(), signature.encode()):
            raise Forbidden(
                "signature_invalid", "this URL was not signed by this service", remedy="Ask for a new one"
            )
        if time.time() >= expires:
            raise Forbidden("signature_expired", "this URL is too old", remedy="Ask for a new one")

    def _signature(self, method: str, path: str, tenant: str, expires: int) -> str:
        # every field has its length before it, so no two requests read the same
        fields = [method.encode(), path.encode(), tenant.encode(), str(expires).encode()]
        message = b"".join(len(field).to_bytes(4, "big") + field for field in (_VERSION, *fields))
        return hmac.new(self._secret(), message, hashlib.sha256).hexdigest()

    def _secret(self) -> bytes:
        found = self._redis.get(SECRET_KEY)
        if found is None:
            self._redis.set(SECRET_KEY, secrets.token_hex(32), nx=True)
            found = self._redis.get(SECRET_KEY)
        assert isinstance(found, bytes)
        return found
