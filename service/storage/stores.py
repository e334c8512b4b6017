"""Open the object store that a URL names: ``file:///folder`` or ``s3://bucket[/prefix]``.

An S3 URL may carry ``endpoint``, ``region`` and ``path_style`` as parameters, never credentials: those come
from the ``AWS_*`` environment.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from obstore.store import LocalStore, ObjectStore, S3Store

from merging.errors import InputError

if TYPE_CHECKING:
    from obstore.store import S3Config

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_PREFIX = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_./=+-]*$")
_PARAMETERS = ("endpoint", "region", "path_style")
CONNECT_SECONDS = 2
READ_SECONDS = 10
RETRY_SECONDS = 4


def open_store(url: str) -> tuple[ObjectStore, Path | None]:
    """The store, and its folder if it is local. Raises ``storage_url_unsupported``."""
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        root = Path(unquote(parts.path))
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return LocalStore(prefix=root), root
    if parts.scheme == "s3":
        return _s3(url), None
    raise _unusable(
        "it is neither a folder nor a bucket", "Use file:///absolute/folder or s3://bucket/prefix"
    )


def _s3(url: str) -> S3Store:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise _unusable("it has credentials in it", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
    prefix = parts.path.strip("/")
    if not _BUCKET.match(parts.netloc):
        raise _unusable("it names no bucket", "Use s3://bucket or s3://bucket/prefix")
    if prefix and (not _PREFIX.match(prefix) or any(part in ("", ".", "..") for part in prefix.split("/"))):
        raise _unusable(
            "its prefix is not usable", "Use letters, digits, '_', '-', '.', '=' and '+', joined by '/'"
        )
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(given) - set(_PARAMETERS))
    if unknown or parts.fragment:
        raise _unusable(
            f"it has the unknown part {(unknown or ['#'])[0]!r}", f"Use only {', '.join(_PARAMETERS)}"
        )
    endpoint = given.get("endpoint") or None
    server = urlsplit(endpoint or os.environ.get("AWS_ENDPOINT_URL") or "https://s3")
    if server.scheme not in ("http", "https") or not server.hostname or server.username or server.query:
        raise _unusable("its endpoint is not an address", "Use http://host:port or https://host[:port]")
    region = given.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    config: S3Config = {
        "region": region or "us-east-1",
        "virtual_hosted_style_request": given.get("path_style", "true").lower() == "false",
    }
    if endpoint:
        config["endpoint"] = endpoint
    return S3Store(
        parts.netloc,
        prefix=prefix or None,
        config=config,
        # There is no limit to a whole request, because a slow client may take hours for a download. One that
        # stands still is given up; reads and parts of uploads are then tried again from where they were.
        client_options={
            "allow_http": server.scheme == "http",
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=READ_SECONDS),
            "timeout": timedelta(days=1),
        },
        retry_config={
            "max_retries": 100,  # it is the time that ends them
            "retry_timeout": timedelta(seconds=RETRY_SECONDS),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=1),
                "base": 2,
            },
        },
    )


def _unusable(problem: str, remedy: str) -> InputError:
    """The URL is not shown: whoever mistook the form may have put a secret into it."""
    return InputError(
        "storage_url_unsupported",
        f"the storage URL cannot be used: {problem}",
        remedy=remedy,
        where={"field": "MERGANSER_STORAGE_URL"},
    )
