"""Settings of every process, read from the environment (prefix ``MERGANSER_``) and checked once."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from merging.errors import InputError
from service.addresses import with_parameters
from service.remote.grants import Grants

GIB = 1 << 30
LOCAL_TENANT = "local"
"""The tenant of a service without keys."""


def default_data_dir() -> Path:
    """``$XDG_DATA_HOME/merganser``, by default ``~/.local/share/merganser``."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "merganser"


class Settings(BaseSettings):
    """What an operator can choose. Frozen: a process never changes its mind while it runs."""

    model_config = SettingsConfigDict(env_prefix="MERGANSER_", extra="forbid", frozen=True)

    redis_url: str | None = None
    """``redis://``, ``rediss://`` or ``unix://``; none: ``merganser up`` starts its own server."""
    storage_url: str | None = None
    """``file:///folder`` or ``s3://bucket[/prefix]``; none: the folder ``storage`` in ``data_dir``."""
    s3_endpoint: str | None = None
    """``https://host[:port]`` of a server other than Amazon's. Credentials come from the AWS variables."""
    s3_region: str | None = None
    s3_path_style: bool = True
    """The bucket is in the path of an address, not in its host name."""
    data_dir: Path = Field(default_factory=default_data_dir)
    host: str = "127.0.0.1"
    port: int = Field(default=8642, ge=0, le=65535)
    auth: Literal["keys", "off"] = "keys"
    """Where nothing is said: ``off`` for a service that only its own machine reaches, else ``keys``."""
    devices: str = "auto"
    """``auto``, or a comma-separated list of ``cpu``, ``cuda``, ``cuda:0``, ... : one worker for each."""
    worker_memory: ByteSize | None = None
    """What each worker may use, such as ``16GB``; none: all its GPU has, or its share of this machine's."""
    warm_horses: bool = False
    """Keep a process ready that has loaded torch, so that a merge need not wait for it."""
    drain_seconds: float = Field(default=25.0, ge=0)
    """So long `merganser worker` lets its merges go on when it is to stop; others do the rest."""
    max_upload_bytes: int = Field(default=16 * GIB, gt=0)
    max_tenant_bytes: int = Field(default=1024 * GIB, gt=0)
    upload_seconds: int = Field(default=24 * 3600, gt=0)
    """So long an upload in parts may take; after that its parts are removed."""
    direct_uploads: bool = False
    """Whether clients send parts straight to the bucket, whose address they must then reach."""
    min_free_bytes: int = Field(default=2 * GIB, ge=0)
    """What is left free on the disks of a storage folder and of work in progress."""
    results_days: float = Field(default=0, ge=0)
    """Merges are deleted so many days after their end, with their results; 0: never."""
    collect_hours: float = Field(default=24, ge=0)
    """So often workers remove what nothing refers to; 0: never."""
    shard_bytes: int = Field(default=2_000_000_000, gt=0)
    """The size of one file of a merged checkpoint; a merge with several is shared among the workers."""
    reads_per_minute: int = Field(default=6000, ge=0)
    writes_per_minute: int = Field(default=1200, ge=0)
    """Of each tenant of a service with keys; 0: no limit."""
    webhook_allow: str = ""
    """Comma-separated hosts and networks to which webhooks may go though they are not public."""
    public_url: str | None = None
    hf_endpoints: str = "https://huggingface.co"
    """Comma-separated: the hubs that merges may import from and push to; the first is the default."""
    hf_token: SecretStr | None = Field(default=None, exclude=True)
    """For the first of these hubs only. It passes to workers in their environment, and nowhere else."""
    hf_grants: str = f"{LOCAL_TENANT}:*"
    """Comma-separated ``tenant:org`` or ``tenant:org/name``, ``*`` for any: who has the use of this token."""

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @field_validator("public_url")
    @classmethod
    def _plain_origin(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("must look like https://host[:port][/prefix]")
        return value.rstrip("/")

    @field_validator("hf_endpoints")
    @classmethod
    def _hubs(cls, value: str) -> str:
        endpoints = [item.strip().rstrip("/") for item in value.split(",") if item.strip()]
        for item in endpoints:
            parts = urlsplit(item)
            plain = not (parts.query or parts.fragment or parts.username or parts.password)
            if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
                raise ValueError(f"{item!r} does not look like https://host[:port][/prefix]")
        return ",".join(endpoints)

    @field_validator("hf_grants")
    @classmethod
    def _grants(cls, value: str) -> str:
        Grants.parse(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _keys_unless_private(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("auth") is None:
            names = [data.get("host") or "127.0.0.1"]
            if data.get("public_url"):
                names.append(urlsplit(str(data["public_url"])).hostname or "")
            private = all(is_loopback(str(name)) for name in names)
            data = {**data, "auth": "off" if private else "keys"}
        return data

    @model_validator(mode="after")
    def _open_only_on_loopback(self) -> Settings:
        if self.auth == "off" and not is_loopback(self.host):
            raise ValueError(
                f"without keys the API may listen on a loopback address only, not on {self.host!r}"
            )
        return self

    @property
    def storage_location(self) -> str:
        """The storage URL, with the default and the parameters of a bucket filled in."""
        return with_parameters(
            self.storage_url or (self.data_dir / "storage").as_uri(),
            endpoint=self.s3_endpoint,
            region=self.s3_region,
            path_style=None if self.s3_path_style else "false",
        )

    @property
    def hf_endpoint_list(self) -> tuple[str, ...]:
        """The hubs that may be reached, the default first."""
        return tuple(item for item in self.hf_endpoints.split(",") if item)

    @property
    def scratch_dir(self) -> Path:
        """Where workers and validation keep temporary files; on the volume of ``data_dir``."""
        return self.data_dir / "scratch"

    def with_redis(self, url: str) -> Settings:
        """The same settings with the address of a Redis server."""
        return self.model_copy(update={"redis_url": url})


def is_loopback(host: str) -> bool:
    """Whether a name or address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def load_settings(**given: Any) -> Settings:
    """Settings from the environment; ``given`` values win. Raises ``settings_invalid``."""
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "host"
        name = f"MERGANSER_{field.upper()}"
        raise InputError(
            "settings_invalid",
            f"{name}: {first['msg'].removeprefix('Value error, ')}",
            remedy=f"Correct the setting {name}",
            where={"field": name},
        ) from error
