"""Errors that only the service raises, each with its HTTP status."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from merging.errors import InputError, MergeError


class ServiceError(InputError):
    """An error of a request. ``status`` is its HTTP status; ``headers`` go with the answer."""

    status = 422
    headers: Mapping[str, str] = MappingProxyType({})


class NotFound(ServiceError):
    """The thing named by the request does not exist, or not for this tenant."""

    status = 404


class Conflict(ServiceError):
    """The request does not fit the present state."""

    status = 409


class Gone(ServiceError):
    """The thing named by the request existed once."""

    status = 410


class Unauthorized(ServiceError):
    """The request needs a key, or another one."""

    status = 401
    headers = MappingProxyType({"WWW-Authenticate": 'Bearer realm="merganser"'})


class Forbidden(ServiceError):
    """The key of the request does not allow this."""

    status = 403


class TooLarge(ServiceError):
    """The request's content is larger than allowed."""

    status = 413


class NoSpace(ServiceError):
    """There is no room left for what the request brings."""

    status = 507


class TooOften(ServiceError):
    """The tenant sends more requests than it may."""

    status = 429

    def __init__(self, name: str, quota: int, seconds: int, headers: Mapping[str, str]) -> None:
        super().__init__(
            "rate_limited",
            f"this tenant may send {quota} {name} requests a minute, and has none left",
            remedy=f"Try again in {seconds} s",
        )
        self.headers = {**headers, "Retry-After": str(seconds)}


class BadRequest(ServiceError):
    """The request is malformed."""

    status = 400


class RangeNotSatisfiable(ServiceError):
    """The asked range lies outside the file."""

    status = 416

    def __init__(self, size: int) -> None:
        super().__init__("range_not_satisfiable", f"the file has {size} bytes; the range lies outside of it")
        self.headers = {"Content-Range": f"bytes */{size}"}


class Unavailable(MergeError):
    """A part of the service cannot be reached at the moment."""

    status = 503
