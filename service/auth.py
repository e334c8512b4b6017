"""Keys: who may do what, for which tenant.

A key reads ``mk_<id>_<secret>``. Its secret has 256 random bits, so a plain SHA-256 of the whole is enough to
recognise it, and that is all that is kept, in storage: a Redis that lost everything locks nobody out.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from service.clock import now
from service.documents import Document
from service.errors import NotFound, ServiceError
from service.settings import LOCAL_TENANT
from service.storage import Storage, StorageUnavailable

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEY_ID_PATTERN = r"^[0-9a-f]{16}$"
FIRST_KEY = "Make the first key where the service runs: merganser keys create --scope admin"
CACHE_SECONDS = 5.0
"""So long a process goes on with what it knows of a key; a revoked one may live as long."""

OUTAGE_SECONDS = 600.0
"""So long it goes on with a good key while the storage is away."""

_CACHED = 4096
_PREFIX = "keys"
_TOKEN = re.compile(r"^mk_([0-9a-f]{16})_([A-Za-z0-9_-]{43})$")
_TENANT = re.compile(r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$")


@dataclass(frozen=True)
class Principal:
    """Whoever sent a request."""

    tenant: str
    scopes: tuple[Scope, ...]
    key_id: str | None = None

    def may(self, scope: Scope) -> bool:
        """Whether a scope is granted; ``admin`` grants all, ``write`` grants ``read``."""
        return SCOPES.index(scope) <= max((SCOPES.index(held) for held in self.scopes), default=-1)


ANYONE = Principal(LOCAL_TENANT, SCOPES)
"""Everybody, in a service without keys."""


class Key(Document):
    """What is kept of a key."""

    id: str
    tenant: str
    name: str | None = None
    scopes: tuple[Scope, ...]
    sha256: str
    created_at: str
    revoked_at: str | None = None


class Keys:
    """The keys of all tenants. Safe to use from several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: OrderedDict[str, tuple[float, Key | None]] = OrderedDict()
        self._lock = threading.Lock()
        self._away_until = 0.0
        self._some = False
        self._looked = -CACHE_SECONDS

    def exist(self) -> bool:
        """Whether a key was ever made. While there is none, storage is asked again every few seconds."""
        if not self._some and time.monotonic() - self._looked >= CACHE_SECONDS:
            self._some = next(iter(self._storage.keys(_PREFIX)), None) is not None
            self._looked = time.monotonic()
        return self._some

    def create(self, tenant: str, scopes: Iterable[Scope], *, name: str | None = None) -> tuple[str, Key]:
        """A new key: the text that its owner keeps, which is nowhere else, and what is stored.

        Raises ``tenant_invalid``, ``scopes_missing``.
        """
        check_tenant(tenant)
        granted = tuple(scope for scope in SCOPES if scope in tuple(scopes))
        if not granted:
            raise ServiceError("scopes_missing", "a key needs at least one scope", where={"field": "scopes"})
        key_id = secrets.token_hex(8)
        token = f"mk_{key_id}_{secrets.token_urlsafe(32)}"
        key = Key(
            id=key_id, tenant=tenant, name=name, scopes=granted, sha256=_digest(token), created_at=now()
        )
        self._save(key)
        return token, key

    def every(self, tenant: str | None = None) -> list[Key]:
        """The keys of a tenant, or of all, by tenant and age; the revoked ones too."""
        paths = [path for path, _ in self._storage.keys(_PREFIX)]
        found = [self._load(path.rpartition("/")[2].removesuffix(".json")) for path in paths]
        keys = [key for key in found if key is not None and tenant in (None, key.tenant)]
        return sorted(keys, key=lambda key: (key.tenant, key.created_at, key.id))

    def revoke(self, key_id: str, *, tenant: str | None = None) -> Key:
        """Make a key useless for good; again is fine. Raises ``key_not_found``."""
        key = self._load(key_id) if re.fullmatch(KEY_ID_PATTERN, key_id) else None
        if key is None or tenant not in (None, key.tenant):
            raise NotFound("key_not_found", f"there is no key {key_id[:64]!r}")
        if key.revoked_at is None:
            key = key.model_copy(update={"revoked_at": now()})
            self._save(key)
        return key

    def cached(self, token: str) -> tuple[bool, Principal | None]:
        """Whether the answer is known without looking into storage, and the answer."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return True, None
        with self._lock:
            moment, key = self._known.get(match.group(1), (0.0, None))
        age = time.monotonic() - moment
        away = time.monotonic() < self._away_until and key is not None
        fresh = bool(moment) and age < (OUTAGE_SECONDS if away else CACHE_SECONDS)
        return fresh, _principal(key, token) if fresh else None

    def identify(self, token: str) -> Principal | None:
        """Whose key this is; None when it is nobody's, or revoked."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        known, found = self.cached(token)
        if known:
            return found
        key_id = match.group(1)
        try:
            key = self._load(key_id)
        except StorageUnavailable:
            self._away_until = time.monotonic() + CACHE_SECONDS
            known, found = self.cached(token)
            if known:
                return found
            raise
        self._remember(key_id, key)
        return _principal(key, token)

    def _remember(self, key_id: str, key: Key | None) -> None:
        with self._lock:
            self._known[key_id] = (time.monotonic(), key)
            self._known.move_to_end(key_id)
            while len(self._known) > _CACHED:
                self._known.popitem(last=False)

    def _save(self, key: Key) -> None:
        self._storage.put_json(_path(key.id), key.model_dump(mode="json"))
        self._some = True
        self._remember(key.id, key)

    def _load(self, key_id: str) -> Key | None:
        data = self._storage.get_json(_path(key_id))
        return None if data is None else Key.model_validate(data)


def check_tenant(tenant: str) -> str:
    """The name of a tenant, which becomes a part of every key and path. Raises ``tenant_invalid``."""
    if not _TENANT.fullmatch(tenant):
        raise ServiceError(
            "tenant_invalid",
            f"{tenant[:64]!r} is not a usable name of a tenant",
            remedy="Use up to 63 lower-case letters, digits and inner hyphens",
            where={"field": "tenant"},
        )
    return tenant


def _principal(key: Key | None, token: str) -> Principal | None:
    digest = _digest(token)
    if key is None or not hmac.compare_digest(key.sha256, digest) or key.revoked_at is not None:
        return None
    return Principal(key.tenant, key.scopes, key.id)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _path(key_id: str) -> str:
    return f"{_PREFIX}/{key_id}.json"
