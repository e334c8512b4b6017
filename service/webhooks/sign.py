"""Signatures of Standard Webhooks (https://www.standardwebhooks.com): HMAC-SHA256 over id, time and body."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

from service.errors import ServiceError

PREFIX = "whsec_"
_SHORTEST, _LONGEST = 24, 64


def new_secret() -> str:
    """A secret of 256 random bits."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def check_secret(secret: str, *, field: str = "secret") -> str:
    """A secret that somebody gave. Raises ``webhook_secret_invalid``, without the secret in it."""
    try:
        if secret.startswith(PREFIX) and _SHORTEST <= len(_bytes(secret)) <= _LONGEST:
            return secret
    except (binascii.Error, ValueError):
        pass
    raise ServiceError(
        "webhook_secret_invalid",
        "the secret of the webhook is not usable",
        remedy=f"Use {PREFIX} and the base64 of {_SHORTEST} to {_LONGEST} random bytes",
        where={"field": field},
    )


def headers(secret: str, message_id: str, moment: int, body: bytes) -> dict[str, str]:
    """The headers of a message that is sent at ``moment`` (seconds since the epoch)."""
    content = f"{message_id}.{moment}.".encode() + body
    digest = hmac.new(_bytes(secret), content, hashlib.sha256).digest()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(moment),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def _bytes(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
