"""Errors that only the service raises, each with its HTTP status."""

from __future__ import annotations

from merging.errors import InputError, MergeError


class ServiceError(InputError):
    """An error of a request. ``status`` is its HTTP status."""

    status = 422


class NotFound(ServiceError):
    """The thing named by the request does not exist, or not for this tenant."""

    status = 404


class Conflict(ServiceError):
    """The request does not fit the present state."""

    status = 409


class Unauthorized(ServiceError):
    """The request needs a key, or another one."""

    status = 401


class Forbidden(ServiceError):
    """The key of the request does not allow this."""

    status = 403


class TooLarge(ServiceError):
    """The request's content is larger than allowed."""

    status = 413


class BadRequest(ServiceError):
    """The request is malformed."""

    status = 400


class RangeNotSatisfiable(ServiceError):
    """The asked range lies outside the file."""

    status = 416

    def __init__(self, size: int) -> None:
        super().__init__("range_not_satisfiable", f"the file has {size} bytes; the range lies outside of it")
        self.size = size


class Unavailable(MergeError):
    """A part of the service cannot be reached at the moment."""

    status = 503
