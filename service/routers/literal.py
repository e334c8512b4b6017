"""Routes that leave a path to the route that spells it out."""

from __future__ import annotations

from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Scope

_LITERALS = ("plan",)


class LiteralFirst(APIRoute):
    """A route whose ``{merge_id}`` is never a word that another route has in this place.

    Otherwise ``GET /v1/merges/plan`` would be a merge with an impossible id, and not a 405.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As any route, with that exception."""
        match, child = super().matches(scope)
        if match is not Match.NONE and child["path_params"].get("merge_id") in _LITERALS:
            return Match.NONE, {}
        return match, child
