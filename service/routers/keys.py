"""The keys of the tenant, for whoever administers it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, status

from service.auth import KEY_ID_PATTERN
from service.deps import AdminDep, ServicesDep
from service.gates import BODY_LIMIT
from service.schemas.keys import KeyInfo, KeyList, KeyRequest, NewKey

router = APIRouter(prefix="/v1/keys", tags=["keys"])


@router.post("", status_code=status.HTTP_201_CREATED, max_body_size=BODY_LIMIT)
def create_key(services: ServicesDep, tenant: AdminDep, body: KeyRequest) -> NewKey:
    """Make a key for the own tenant. Its text is in this answer and nowhere else."""
    token, key = services.keys.create(tenant, body.scopes, name=body.name)
    return NewKey(**KeyInfo.of(key).model_dump(), key=token)


@router.get("")
def list_keys(services: ServicesDep, tenant: AdminDep) -> KeyList:
    """The keys of the own tenant, the oldest first, the revoked ones too."""
    return KeyList(data=[KeyInfo.of(key) for key in services.keys.every(tenant)])


@router.delete("/{key_id}")
def revoke_key(
    services: ServicesDep,
    tenant: AdminDep,
    key_id: Annotated[str, Path(description="Id of the key", pattern=KEY_ID_PATTERN)],
) -> KeyInfo:
    """Make a key useless for good; it may still work for some seconds. Doing it again changes nothing."""
    return KeyInfo.of(services.keys.revoke(key_id, tenant=tenant))
