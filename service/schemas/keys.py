"""Keys, without what makes them keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from service.auth import Key, Scope


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class KeyRequest(_Strict):
    """What a new key shall be good for."""

    scopes: list[Scope] = Field(min_length=1, max_length=3, description="each grants those before it")
    name: str | None = Field(default=None, min_length=1, max_length=200)


class KeyInfo(_Strict):
    """A key."""

    id: str
    name: str | None
    scopes: list[Scope]
    created_at: str
    revoked_at: str | None

    @classmethod
    def of(cls, key: Key) -> KeyInfo:
        """The public form of what is stored."""
        return cls.model_validate(key.model_dump(mode="json", exclude={"tenant", "sha256"}))


class NewKey(KeyInfo):
    """A new key, with the text that is shown once."""

    key: str = Field(description="`mk_<id>_<secret>`; nobody can show it again")


class KeyList(_Strict):
    """The keys of a tenant."""

    data: list[KeyInfo]
