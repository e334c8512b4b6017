"""Uploads in parts: what is announced, and where the parts go, in the shape of Git LFS multipart."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from service.schemas.models import StoredFile


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class UploadRequest(_Strict):
    """The file that is to come."""

    model: str = Field(max_length=200, description="`ns/name`")
    path: str = Field(max_length=255, description="path of the file inside the model")
    size: int = Field(ge=1, le=1 << 53, description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="hexadecimal")
    part_size: int | None = Field(
        default=None, ge=1 << 16, le=1 << 30, description="a wish; `part_size` of the answer is what counts"
    )


class PartEtag(BaseModel):
    """A part that was sent. It is taken but not needed: the service knows its parts."""

    model_config = ConfigDict(extra="ignore")

    partNumber: int  # noqa: N815 (the name in Git LFS)
    etag: str = Field(max_length=200)


class CompleteRequest(BaseModel):
    """What a client of Git LFS says at the end. Nothing of it is needed."""

    model_config = ConfigDict(extra="ignore")

    oid: str | None = Field(default=None, max_length=100, description="the sha256 that was announced")
    parts: list[PartEtag] = Field(default_factory=list, max_length=10_000)


class PartState(_Strict):
    """One part."""

    number: int
    size: int = Field(description="bytes")
    received: bool


class UploadAction(_Strict):
    """`header` holds `chunk_size` and, by the number of each part, the URL to PUT it to; `href` completes."""

    href: str
    header: dict[str, str]
    expires_in: int = Field(description="seconds that the URLs are good for; ask for new ones with GET")


class UploadActions(_Strict):
    """What is to be done."""

    upload: UploadAction


class UploadSession(_Strict):
    """An upload in parts."""

    id: str
    state: str = Field(description="`open` or `complete`")
    model: str | None
    path: str | None
    size: int
    sha256: str
    part_size: int
    created_at: str
    expires_at: str
    parts: list[PartState]
    actions: UploadActions | None = Field(description="none when it is complete")
    file: StoredFile | None = Field(description="once it is complete: the file of the next revision")


class ReceivedPart(_Strict):
    """A part that has arrived."""

    number: int
    size: int
    sha256: str
