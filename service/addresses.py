"""Addresses with parameters, as settings and storage write them."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode, urlsplit


def with_parameters(url: str, **parameters: str | None) -> str:
    """An S3 URL with parameters that it does not have yet; other URLs stay as they are."""
    parts = urlsplit(url)
    if parts.scheme != "s3":
        return url
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    more = {name: value for name, value in parameters.items() if value is not None}
    return parts._replace(query=urlencode({**more, **given})).geturl()
