"""Models, revisions and files."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from service.documents import Manifest


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CommitRequest(_Strict):
    """What the revision is to be made of."""

    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] | None = Field(
        default=None,
        max_length=1000,
        description="all files, by path, with their sha256 (hexadecimal); without it, whatever was uploaded "
        "since the last commit",
    )


class StoredFile(_Strict):
    """One file and what its content is."""

    path: str
    sha256: str = Field(description="hexadecimal")
    size: int = Field(description="bytes")


class Revision(_Strict):
    """An immutable revision of a model."""

    model: str = Field(description="`ns/name`")
    revision: str = Field(description="40 hexadecimal digits; changes with the content")
    created_at: str
    format: str
    modules: int = Field(description="how many modules the adapter changes")
    rank: int = Field(description="the largest rank of a module")
    base_model: str | None
    warnings: list[str]
    size: int = Field(description="bytes of all files")
    files: list[StoredFile]

    @classmethod
    def of(cls, manifest: Manifest) -> Revision:
        """The public form of a manifest."""
        data = manifest.model_dump(mode="json")
        return cls.model_validate({**data, "size": sum(entry.size for entry in manifest.files)})


class RevisionPage(_Strict):
    """A page of revisions."""

    data: list[Revision]
    next_cursor: str | None
