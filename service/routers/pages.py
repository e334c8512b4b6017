"""The description of the API as a page, from files of our own: nothing is loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

_STATIC = Path(__file__).resolve().parents[1] / "static"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/docs")
def docs_page() -> FileResponse:
    """The page."""
    return FileResponse(_STATIC / "docs.html", headers=_HEADERS)


@router.get("/docs/docs.js")
def docs_script() -> FileResponse:
    """What starts the page."""
    return FileResponse(_STATIC / "docs.js", headers=_HEADERS)


@router.get("/docs/swagger-ui-bundle.js")
def docs_library() -> FileResponse:
    """The library that draws the page."""
    return FileResponse(_STATIC / "swagger-ui" / "swagger-ui-bundle.js", headers=_HEADERS)


@router.get("/docs/swagger-ui.css")
def docs_style() -> FileResponse:
    """Its style."""
    return FileResponse(_STATIC / "swagger-ui" / "swagger-ui.css", headers=_HEADERS)
