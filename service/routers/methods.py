"""The catalogue of merge methods."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from merging import catalog
from merging.errors import InputError
from service.deps import ReaderDep
from service.errors import NotFound

router = APIRouter(prefix="/v1/methods", tags=["methods"])


@router.get("")
def list_methods(_tenant: ReaderDep) -> list[dict[str, Any]]:
    """All methods: name, title, summary, paper, contract, parameters (JSON schema), defaults."""
    return catalog.describe()


@router.get("/{name}")
def get_method(_tenant: ReaderDep, name: str) -> dict[str, Any]:
    """One method."""
    try:
        return catalog.describe(name)[0]
    except InputError as error:
        raise NotFound(error.code, error.message, remedy=error.remedy) from error
